"""A made-up report in which every field is filled and every outcome occurs."""

from __future__ import annotations

from rk_export.report.records import (
    Finding,
    Fusion,
    LayerError,
    Outcome,
    ParityTier,
    Report,
    SizeSummary,
    Spectrum,
)

LAYERS = 6


def full_report() -> Report:
    """Return a report of six layers."""
    return Report(
        model="example/tiny-llama",
        model_type="llama",
        created="2026-01-02T03:04:05Z",
        command="rk-export compress example/tiny-llama -o out --keep 0.9",
        versions={"rk-export": "0.1.0", "onnxruntime": "1.31.0"},
        findings=tuple(finding for layer in range(LAYERS) for finding in layer_findings(layer)),
        fusions=(
            Fusion("shared down-projection", 5, 5),
            Fusion("GroupQueryAttention", 6, 5, "layer 2 has no key norm"),
        ),
        parity=parity_tiers(),
        layer_errors=tuple(
            LayerError(layer, 0.01 * (layer + 1), 0.02 * (layer + 1)) for layer in range(LAYERS)
        ),
        spectra=tuple(spectrum(layer, 4 if layer else None) for layer in range(LAYERS)),
        size=SizeSummary(2_000_000, 1_800_000, 8_000_000, 1_120_000, 1_200_000),
        timings={"load": 0.085, "export": 12.34, "verify": 200.0},
        notices=("No CUDA execution provider: verified on the CPU provider.",),
        warnings=("the compressed model is far from the dense one: 0.9 nats a token",),
    )


def layer_findings(layer: int) -> list[Finding]:
    """Return what the passes say about one layer: factorized, quantized, one group skipped, one refused."""
    qk, gate_up = f"layers.{layer}.self_attn.qk", f"layers.{layer}.mlp.gate_up"
    quantized = {"pass": "quantize", "bits": 4, "block": 32}
    findings = [Finding(qk, Outcome.SKIPPED, "matched by ignore", 4000, 4000)]
    if layer:
        details = {"pass": "joint_rank", "rank": 4, "pairs": 1}
        findings = [Finding(qk, Outcome.APPLIED, "", 4000, 3000, 0.125, details)]
    findings.append(Finding(qk, Outcome.APPLIED, "", findings[0].bytes_after, 500, 0.0625, quantized))
    refusal = f"block 32 does not divide the width {570 + layer}"
    findings.append(Finding(gate_up, Outcome.REFUSED, refusal, 9000, 9000))
    return findings


def parity_tiers() -> tuple[ParityTier, ...]:
    """Return an informational, a passing and a failing tier."""
    return (
        ParityTier("a", "dense vs factorized", 12.3, 43.1, None, 0.213, 0.81, None, "error of the method"),
        ParityTier("c", "quantized vs ONNX Runtime", 2.1e-4, 42.4, 1e-4, 1.2e-9, 1.0, True),
        ParityTier("f", "left-padded batch vs single rows", 0.0172, 42.4, 1e-4, 2e-6, 0.997, False, "row 3"),
    )


def spectrum(layer: int, rank: int | None) -> Spectrum:
    """Return the spectrum of one group with eight singular values."""
    values = [2.0**-i for i in range(8)]
    return Spectrum(f"layers.{layer}.self_attn.qk", values, rank, 8, 3.1, 1.3, 2, 3, 4, 5)
