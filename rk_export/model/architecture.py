"""Names of a model family: where it keeps its weight matrices, in PyTorch and in the exported graph.

All decoders are exported with the module names of Llama; an ``Architecture`` holds the torch names besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from transformers import PretrainedConfig

Role = Literal["q", "k", "v", "o", "conv_in", "conv_out", "gate", "up", "down", "expert"]
RolePaths = tuple[tuple[Role, str], ...]

ATTENTION: RolePaths = (
    ("q", "self_attn.q_proj"),
    ("k", "self_attn.k_proj"),
    ("v", "self_attn.v_proj"),
    ("o", "self_attn.o_proj"),
)
# Exported path of a learned table of positions.
POSITIONS = "model.embed_positions"
GATED_MLP: RolePaths = (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj"))


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads of a layer: query heads, key/value heads and the width of one."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Projection:
    """One weight matrix that may be rewritten.

    Args:
        role: What it computes.
        path: Torch path relative to the layer in canonical form; an ``nn.Linear``, weight (out, in).
        onnx_path: Path of the linear module relative to the exported layer module.
    """

    role: Role
    path: str
    onnx_path: str


def nothing_shared(config: PretrainedConfig) -> RolePaths:
    """Return no matrices: the mixture has no shared expert."""
    return ()


@dataclass(frozen=True)
class MixtureNames:
    """Where a family keeps its mixtures of experts; torch paths relative to a layer in canonical form.

    Args:
        within: Whether the MLP of a layer, by its number, is a mixture.
        experts: The list of experts.
        count_field: Field of the config that counts them.
        readers: What reads the mixture's input beside the matrices that may be rewritten: the router and the like.
        shared: Matrices of the MLP that every token runs through beside its experts; none where there is no such MLP.
    """

    within: Callable[[PretrainedConfig, int], bool]
    experts: str = "mlp.experts"
    count_field: str = "num_local_experts"
    readers: tuple[str, ...] = ("mlp.gate",)
    shared: Callable[[PretrainedConfig], RolePaths] = nothing_shared

    def matrices(self, config: PretrainedConfig) -> RolePaths:
        """Return the rewritable matrices of a mixture, experts first: gate, up and down of each."""
        names, count = ("gate_proj", "up_proj", "down_proj"), int(getattr(config, self.count_field))
        experts: RolePaths = tuple(
            ("expert", f"{self.experts}.{number}.{name}") for number in range(count) for name in names
        )
        return experts + self.shared(config)


@dataclass(frozen=True)
class Architecture:
    """Names of one model family.

    Args:
        model_type: ``config.model_type``.
        layers: Torch path of the list of layers.
        embedding: Torch path of the token embedding.
        lm_head: Torch path of the output projection; None for an encoder, which gives hidden states or answers.
        onnx_layers: Path of the list of layers in the exported module.
        onnx_embedding: Path of the token embedding in the exported module.
        onnx_lm_head: Path of the output projection in the exported module; None for encoders.
        attention: Rewritable attention matrices: role and torch path in canonical form.
        other_mixers: Gives those of a layer, by its number, that mixes tokens by something else than attention; None
            for a layer with attention. Without it every layer has attention.
        mlp: Rewritable matrices of a dense MLP; experts are listed by ``projections``.
        renamed: Torch path -> exported path, within a layer, of every module where the two differ.
        outer: Torch path -> exported path of the modules outside the layers, embedding and head included.
        unused: Torch paths of modules that the exported model does not have.
        pretraining: Beginnings of the names that a pretraining head has in checkpoints; an encoder goes without.
        rotary: Torch path of the module that computes rotary frequencies.
        skipped_positions: Rows of the learned table of positions before that of position 0.
        width_field: Field of the config that holds the width of a dense MLP; empty where the hidden size sets it.
        width_switches: Fields that compute another width from it while they are on.
        context_field: Field of the config that holds the longest sequence; `own_context` reads it.
        unit_offset: Its norms store their gain minus one.
        tuple_layers: Its layers return a tuple with the hidden states in front.
        mixture: Names of its mixtures of experts; None = no layer has one.
        rewrite: Brings one layer into canonical form, in place.
    """

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    lm_head: str | None = "lm_head"
    onnx_layers: str = "model.layers"
    onnx_embedding: str = "model.embed_tokens"
    onnx_lm_head: str | None = "lm_head"
    attention: RolePaths = ATTENTION
    other_mixers: Callable[[PretrainedConfig, int], RolePaths | None] | None = None
    mlp: RolePaths = GATED_MLP
    renamed: Mapping[str, str] = field(default_factory=dict)
    outer: Mapping[str, str] = field(default_factory=lambda: {"model.norm": "model.norm"})
    unused: tuple[str, ...] = ()
    pretraining: tuple[str, ...] = ("cls.", "lm_head.")
    rotary: str = "model.rotary_emb"
    skipped_positions: int = 0
    width_field: str = "intermediate_size"
    width_switches: tuple[str, ...] = ()
    context_field: str = "max_position_embeddings"
    unit_offset: bool = False
    tuple_layers: bool = False
    mixture: MixtureNames | None = None
    rewrite: Callable[[nn.Module], None] | None = None

    @property
    def is_encoder(self) -> bool:
        """Whether the model reads a text as a whole and gives hidden states or answers, and no next token."""
        return self.lm_head is None

    @property
    def has_learned_positions(self) -> bool:
        """Whether the model adds a learned table of positions, and rotates nothing."""
        return POSITIONS in self.outer.values()

    def has_experts(self, config: PretrainedConfig, layer_index: int) -> bool:
        """Return whether the MLP of layer ``layer_index`` is a mixture of experts."""
        return self.mixture is not None and self.mixture.within(config, layer_index)

    def projections(self, config: PretrainedConfig, layer_index: int) -> tuple[Projection, ...]:
        """Return the rewritable matrices of layer ``layer_index``, in the order of the forward pass."""
        mixture = self.mixture if self.has_experts(config, layer_index) else None
        mlp = self.mlp if mixture is None else mixture.matrices(config)
        mixer = self.other_mixers(config, layer_index) if self.other_mixers else None
        paths = (self.attention if mixer is None else mixer) + mlp
        return tuple(Projection(role, path, self.onnx_path(path)) for role, path in paths)

    def onnx_path(self, path: str) -> str:
        """Return the exported path of a torch path, both relative to the layer."""
        for torch_path, onnx_path in self.renamed.items():
            if path == torch_path or path.startswith(f"{torch_path}."):
                return onnx_path + path[len(torch_path) :]
        return path

    def canonicalize(self, layer: nn.Module) -> None:
        """Bring a torch layer into canonical form, in place; its function does not change.

        Joined matrices become separate ``nn.Linear`` children, ``Conv1D`` becomes ``nn.Linear``, stacked
        experts become one module each. Works on meta tensors; a second call changes nothing.
        """
        if self.rewrite is not None:
            self.rewrite(layer)
