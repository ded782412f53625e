"""Before work begins: the model is what transformers computes, and it fits what is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from conftest import Cli, tiny_options
from safetensors.torch import load_file, save_file
from sentence_models import write_modules
from tiny_models import DECODERS, FAMILIES, tiny_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import rk_export
from rk_export.errors import InputError, ParityError
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.target import Target
from rk_export.parity import half_range, oracle
from rk_export.parity.preflight import preflight
from rk_export.passes.prepare.fold import fold_layer
from rk_export.passes.prepare.wiring import Wiring
from rk_export.source import prepared
from rk_export.source.stored import StoredModel, open_source
from rk_export.source.tensor_files import StoredTensors

SourceOf = Callable[..., StoredModel]
PORTABLE = Recipe(target=Target("portable"))


# --- tier 0: transformers against what we read


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_as_transformers_reads_it(source_of: SourceOf, family: str) -> None:
    tier = preflight(source_of(family), tiny_options()).tier
    assert (tier.tier, tier.passed) == ("0", True)
    assert tier.relative_error is not None
    assert tier.relative_error < 1e-5
    assert tier.note.endswith(".from_pretrained")


def test_an_embedding_model_that_was_saved_as_a_decoder(tmp_path: Path) -> None:
    """Qwen3-Embedding names ForCausalLM in its config; modules.json says that its states are what it gives."""
    tiny_model("qwen3").save_pretrained(tmp_path)
    write_modules(tmp_path, 64, pooling={"pooling_mode": "lasttoken"})
    tier = preflight(open_source(tmp_path), tiny_options()).tier
    assert (tier.passed, tier.note) == (True, "Qwen3Model.from_pretrained")


def doubled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our loader read one tensor wrongly; transformers reads the file itself."""
    read = StoredModel.tensor

    def wrong(self: StoredModel, key: str) -> Tensor:
        return read(self, key) * (1.001 if key == name else 1.0)

    monkeypatch.setattr(StoredModel, "tensor", wrong)


def test_a_tensor_read_wrongly_stops_the_run_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    doubled("model.layers.1.mlp.up_proj.weight", monkeypatch)
    monkeypatch.setattr("rk_export.commands.stages.compression_inputs", None)
    ended = cli(
        "compress", llama, "-o", tmp_path / "out", "--recipe", "int4", "--set", "calibration.text=none"
    )
    assert ended.code == 1
    assert "tier 0 (transformers vs PyTorch dense)" in ended.err
    assert "Fix: the model is not read as transformers reads it" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
def test_verification_against_a_model_reads_it_anew(
    llama: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = rk_export.verify(bundle, llama, provider="cpu", run=Run(threads=1))
    assert "".join(tier.tier for tier in tiers) == "0pabcdefghi"
    assert all(tier.passed for tier in tiers if tier.bound is not None)
    doubled("model.norm.weight", monkeypatch)
    with pytest.raises(ParityError, match="tier 0"):
        rk_export.verify(bundle, llama, provider="cpu", run=Run(threads=1))


STORED = [torch.bfloat16, torch.float16, torch.float32]


def loaded_in_float32(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits of a model that transformers widens as a whole when it loads it."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    auto = AutoModel if "bert" in folder.name else AutoModelForCausalLM
    model = auto.from_pretrained(folder, trust_remote_code=False, **options).eval()
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=False)
    return output.logits if "logits" in output else output.last_hidden_state


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_widening_a_module_at_a_time_is_loading_in_float32(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    folder = tmp_path / family
    tiny_model(family).to(dtype).save_pretrained(folder)
    tokens = torch.arange(3, 23)[None]
    found = oracle.transformers_logits(open_source(folder), tokens)
    assert found.logits.dtype is torch.float32
    assert found.note.endswith(".from_pretrained")
    assert torch.equal(found.logits, loaded_in_float32(folder, tokens))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_what_a_class_computes_in_its_type_is_taken_in_float32(tmp_path: Path, family: str) -> None:
    """The root of 96, which scales the embedding, is no number of bfloat16."""
    tiny_model(family, hidden_size=96).to(torch.bfloat16).save_pretrained(tmp_path / family)
    tokens = torch.arange(3, 23)[None]
    found = oracle.transformers_logits(open_source(tmp_path / family), tokens).logits
    assert torch.equal(found, loaded_in_float32(tmp_path / family, tokens))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "bert"])
def test_a_model_of_several_types_is_read_in_float32(tmp_path: Path, family: str) -> None:
    """A float32 norm beside bfloat16 matrices: no type of the file's holds both."""
    folder = tmp_path / family
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    fine = {name: tensor.float() + 1e-5 for name, tensor in tensors.items() if "norm" in name.lower()}
    save_file({**tensors, **fine}, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(3, 23)[None]
    found = oracle.transformers_logits(open_source(folder), tokens)
    assert found.note.endswith(".from_pretrained")
    assert torch.equal(found.logits, loaded_in_float32(folder, tokens))


class Renamed:
    """Tensors under other names than in the files; those asked for are scaled."""

    def __init__(self, stored: StoredTensors, scaled: str = "") -> None:
        self._stored, self._scaled = stored, scaled

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._stored.shapes

    @property
    def files(self) -> frozenset[Path]:
        return self._stored.files

    def place(self, name: str) -> str:
        return self._stored.place(name)

    def read(self, name: str) -> Tensor:
        return self._stored.read(name) * (2 if name == self._scaled else 1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert"])
def test_tensors_that_are_not_the_files_own_fill_transformers_class(
    source_of: SourceOf, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(source_of(family).folder)
    name = next(name for name, shape in source.stored.shapes.items() if len(shape) == 2)
    source._stored = Renamed(source.stored, name)
    with pytest.raises(ParityError, match="tier 0"):
        preflight(source, tiny_options())
    source.changed = "an adapter is merged"
    tier = preflight(source, tiny_options()).tier
    assert tier.passed
    assert tier.note.endswith("filled by name with the tensors as rk-export read them: an adapter is merged")
    assert "filled by name" in caplog.text


def test_a_converted_family_is_filled_too(source_of: SourceOf) -> None:
    source = open_source(source_of("mixtral").folder)
    source.changed = "an adapter is merged"
    tier = preflight(source, tiny_options()).tier
    assert tier.passed
    assert "filled by name" in tier.note


def test_a_folder_that_transformers_does_not_read_completely_is_filled(llama: Path, tmp_path: Path) -> None:
    """Names under a prefix that transformers does not know: from_pretrained would start every tensor at random."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    tier = preflight(open_source(folder), tiny_options()).tier
    assert tier.passed
    assert "transformers finds no tensor" in tier.note


def test_a_tensor_that_transformers_misses_is_named(llama: Path) -> None:
    source = open_source(llama)
    shapes = {name: shape for name, shape in source.stored.shapes.items() if name != "model.norm.weight"}

    class Lacking(Renamed):
        @property
        def shapes(self) -> Mapping[str, tuple[int, ...]]:
            return shapes

    source._stored, source.changed = Lacking(source.stored), "an adapter is merged"
    with pytest.raises(InputError, match=r"no tensor 'model\.norm\.weight'"):
        oracle.transformers_logits(source, torch.arange(3, 9)[None])


# --- tier p: the untouched model against the prepared one


@pytest.mark.whole
def test_a_broken_reparameterization_shows_in_its_tier_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm that feeds one matrix more than is known: its gain is lost there, in every version alike."""

    def forgetful(layer: torch.nn.Module, wiring: Wiring, norms: tuple[str, ...]) -> None:
        lost = layer.get_submodule("mlp.up_proj").weight.clone()
        fold_layer(layer, wiring, norms)
        layer.get_submodule("mlp.up_proj").weight.data = lost

    monkeypatch.setattr(prepared, "fold_layer", forgetful)
    options = tiny_options(prepare=("fold",))
    with pytest.raises(ParityError, match=r"tier p \(PyTorch dense vs prepared\)") as caught:
        rk_export.compress(llama, tmp_path / "out", options, run=Run(threads=1))
    assert "; tier" not in str(caught.value)
    with pytest.raises(ParityError, match="tier p"):
        rk_export.prepare(llama, tmp_path / "prepared", ("fold",))
    assert not (tmp_path / "out").exists()


@pytest.mark.whole
def test_exact_reparameterizations_pass_and_are_named(llama: Path, tmp_path: Path) -> None:
    options = tiny_options(prepare=("fold", "rotate", "rotate-heads"))
    report = rk_export.compress(llama, tmp_path / "out", options, run=Run(threads=1))
    tier = report.parity[1]
    assert (tier.tier, tier.passed) == ("p", True)
    assert tier.max_error
    assert tier.note.startswith("fold, rotate, rotate-heads; ")


@pytest.mark.whole
def test_a_checkpoint_says_what_it_cannot_show(llama: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    rk_export.compress(llama, tmp_path / "first", tiny_options(), checkpoint=saved, run=Run(threads=1))
    report = rk_export.export(saved, tmp_path / "second", run=Run(threads=1))
    assert "".join(tier.tier for tier in report.parity) == "0pabcdefghi"
    missing = [tier for tier in report.parity if tier.max_error is None]
    assert "".join(tier.tier for tier in missing) == "0pab"
    assert {tier.note for tier in missing} == {"not measured: a compressed checkpoint holds no dense model"}


# --- fp16


def loud(folder: Path, factor: float) -> Path:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] *= factor
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_an_fp16_graph_that_would_overflow_is_refused_before_work(
    tmp_path: Path, cli: Cli, command: str
) -> None:
    model = loud(tmp_path / "model", 1e5)
    ended = cli(command, model, "-o", tmp_path / "out", "--ep", "portable")
    assert ended.code == 2
    assert "layer 1, mlp.down_proj, output reaches" in ended.err
    assert "--ep cpu" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_fp16_is_named(tmp_path: Path) -> None:
    source = open_source(loud(tmp_path / "model", 1e7))
    with pytest.raises(InputError, match=r"layer 1, weight mlp\.down_proj\.weight reaches"):
        preflight(source, PORTABLE)


def test_values_near_the_end_of_the_range_are_a_notice(tmp_path: Path) -> None:
    source = open_source(loud(tmp_path / "model", 2e3))
    (notice,) = preflight(source, PORTABLE).notices
    assert "other texts may overflow" in notice
    assert preflight(source, Recipe()).notices == ()


@pytest.mark.parametrize("family", DECODERS)
def test_ordinary_models_raise_no_false_alarm(source_of: SourceOf, family: str) -> None:
    assert preflight(source_of(family), PORTABLE).notices == ()


def test_what_is_no_number_counts_as_infinite() -> None:
    peaks = half_range.Peaks()
    peaks.note("somewhere", torch.tensor([1.0, float("nan")]))
    with pytest.raises(InputError, match="somewhere reaches inf"):
        half_range.check_half_range(peaks, "model")
