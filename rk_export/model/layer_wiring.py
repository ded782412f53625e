"""Which matrices of a decoder layer read which norm, and which write to the residual stream."""

from __future__ import annotations

from rk_export.model.architecture import Architecture
from rk_export.model.decoder_spec import NormNames
from rk_export.model.description import ModelDescription
from rk_export.passes.prepare.wiring import Wiring


def wiring_of(description: ModelDescription, index: int) -> Wiring:
    """Return what reads and writes the residual stream in decoder layer `index`."""
    architecture, spec = description.architecture, description.decoder
    projections = description.projections(index)
    path = {item.role: item.path for item in projections if item.role != "expert"}
    experts = [item.path for item in projections if item.role == "expert"]
    triples = list(zip(experts[::3], experts[1::3], experts[2::3], strict=True))
    reads_mlp = [path[role] for role in ("gate", "up") if role in path]
    reads_mlp += [item for gate, up, _ in triples for item in (gate, up)]
    if architecture.mixture is not None and experts:
        reads_mlp += architecture.mixture.readers
    mixes = tuple(path[role] for role in ("q", "k", "v", "conv_in") if role in path)
    own_mlp = ((path["up"], path["down"]),) if "up" in path else ()
    mlps = (*((up, down) for _, up, down in triples), *own_mlp)
    return Wiring(
        norms=_norms(architecture, spec.norm_names, mixes, tuple(reads_mlp)),
        writers=(path["o"] if "o" in path else path["conv_out"], *(down for _, down in mlps)),
        mixes=mixes,
        value=path.get("v"),
        output=path.get("o"),
        kv_heads=spec.heads.kv_heads,
        mlps=mlps,
        unit_offset=architecture.unit_offset,
    )


def _norms(
    architecture: Architecture, names: NormNames, attention: tuple[str, ...], mlp: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Return the readers of each norm in front of a block; one norm may stand in front of both."""
    torch_path = {onnx: torch for torch, onnx in architecture.renamed.items()}
    norms: dict[str, tuple[str, ...]] = {}
    for name, readers in ((names.before_attention, attention), (names.before_mlp, mlp)):
        if name is not None:
            path = torch_path.get(name, name)
            norms[path] = (*norms.get(path, ()), *readers)
    return norms
