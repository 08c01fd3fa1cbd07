"""Where the weights of encoders come from: stems of tensor names as transformers writes them, and their derivation.

A stem has no `.weight` or `.bias`; a norm's vector is the stem's weight. Heads stand beside the body, outside its
prefix, except where a stem begins with `<body>`.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from inhouse.model.build import Spec, weight_specs
from inhouse.model.encoder import RELATIVE, EncoderSpec
from inhouse.model.families.family import Derive, Family, Rows, none_left

BODY = "<body>"
DENSE = "sentence.dense"  # what load calls the tensors of a `2_Dense` folder

_BERT_LAYER = {
    "layers.{i}.attn.q": "encoder.layer.{i}.attention.self.query",
    "layers.{i}.attn.k": "encoder.layer.{i}.attention.self.key",
    "layers.{i}.attn.v": "encoder.layer.{i}.attention.self.value",
    "layers.{i}.attn.o": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attn_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.mlp.up": "encoder.layer.{i}.intermediate.dense",
    "layers.{i}.mlp.down": "encoder.layer.{i}.output.dense",
    "layers.{i}.mlp_norm": "encoder.layer.{i}.output.LayerNorm",
}
_TABLES = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}
BERT: Mapping[str, str] = {**_TABLES, "embed_proj": "embeddings_project", **_BERT_LAYER}
MPNET: Mapping[str, str] = {
    **BERT,
    **{f"layers.{{i}}.attn.{part}": f"encoder.layer.{{i}}.attention.attn.{part}" for part in "qkvo"},
    "layers.{i}.attn_norm": "encoder.layer.{i}.attention.LayerNorm",
    "relative": "encoder.relative_attention_bias",
}
_ALBERT = "encoder.albert_layer_groups.{i}.albert_layers.0."
ALBERT: Mapping[str, str] = {
    **_TABLES,
    "embed_proj": "encoder.embedding_hidden_mapping_in",
    "layers.{i}.attn.q": f"{_ALBERT}attention.query",
    "layers.{i}.attn.k": f"{_ALBERT}attention.key",
    "layers.{i}.attn.v": f"{_ALBERT}attention.value",
    "layers.{i}.attn.o": f"{_ALBERT}attention.dense",
    "layers.{i}.attn_norm": f"{_ALBERT}attention.LayerNorm",
    "layers.{i}.mlp.up": f"{_ALBERT}ffn",
    "layers.{i}.mlp.down": f"{_ALBERT}ffn_output",
    "layers.{i}.mlp_norm": f"{_ALBERT}full_layer_layer_norm",
}
_DISTIL = "transformer.layer.{i}."
DISTILBERT: Mapping[str, str] = {
    **_TABLES,
    **{f"layers.{{i}}.attn.{part}": f"{_DISTIL}attention.{part}_lin" for part in "qkv"},
    "layers.{i}.attn.o": f"{_DISTIL}attention.out_lin",
    "layers.{i}.attn_norm": f"{_DISTIL}sa_layer_norm",
    "layers.{i}.mlp.up": f"{_DISTIL}ffn.lin1",
    "layers.{i}.mlp.down": f"{_DISTIL}ffn.lin2",
    "layers.{i}.mlp_norm": f"{_DISTIL}output_layer_norm",
}
MODERNBERT: Mapping[str, str] = {
    "embed": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "layers.{i}.attn.q": "layers.{i}.attn.Wqkv|0/3",
    "layers.{i}.attn.k": "layers.{i}.attn.Wqkv|1/3",
    "layers.{i}.attn.v": "layers.{i}.attn.Wqkv|2/3",
    "layers.{i}.attn.o": "layers.{i}.attn.Wo",
    "layers.{i}.attn_norm": "layers.{i}.attn_norm",
    "layers.{i}.mlp.gate": "layers.{i}.mlp.Wi|0/2",
    "layers.{i}.mlp.up": "layers.{i}.mlp.Wi|1/2",
    "layers.{i}.mlp.down": "layers.{i}.mlp.Wo",
    "layers.{i}.mlp_norm": "layers.{i}.mlp_norm",
    "final_norm": "final_norm",
}

_BLOCK = "blk.{i}."
GGUF: Mapping[str, str] = {
    "embed": "token_embd",
    "positions": "position_embd",
    "types": "token_types",
    "embed_norm": "token_embd_norm",
    **{f"layers.{{i}}.attn.{part}": f"{_BLOCK}attn_{part}" for part in "qkv"},
    "layers.{i}.attn.o": f"{_BLOCK}attn_output",
    "layers.{i}.attn_norm": f"{_BLOCK}attn_output_norm",
    "layers.{i}.mlp.up": f"{_BLOCK}ffn_up",
    "layers.{i}.mlp.down": f"{_BLOCK}ffn_down",
    "layers.{i}.mlp_norm": f"{_BLOCK}layer_output_norm",
}

POOLER_HEAD: Mapping[str, str] = {"head.dense": f"{BODY}pooler.dense", "head.out": "classifier"}
OWN_HEAD: Mapping[str, str] = {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}
ALBERT_HEAD: Mapping[str, str] = {"head.dense": f"{BODY}pooler", "head.out": "classifier"}
DISTILBERT_HEAD: Mapping[str, str] = {"head.dense": "pre_classifier", "head.out": "classifier"}
MODERNBERT_HEAD: Mapping[str, str] = {"head.dense": "head.dense", "head.norm": "head.norm", "head.out": "classifier"}
TOKEN_HEAD: Mapping[str, str] = {"head.out": "classifier"}

# Buffers, and heads of pre-training that neither embed nor classify.
IGNORED = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|inv_freq)|(.*\.)?pooler(\.dense)?\.(weight|bias)|(cls|predictions|lm_head"
    r"|sop_classifier|vocab_transform|vocab_layer_norm|vocab_projector|discriminator_predictions"
    r"|generator_predictions|generator_lm_head)\..*"
)
MASKED_HEAD = re.compile(r"(head|decoder)\..*")  # ModernBERT's, where the class does not classify


@dataclass(frozen=True, slots=True)
class EncoderFamily(Family):
    """One row of the table of families: an encoder's. `hf_names` are stems of the body, `heads` those of its heads."""

    heads: Mapping[str, str] = field(default_factory=dict)

    def derive(self, spec: Spec, names: Collection[str]) -> dict[str, Derive]:
        """Canonical name -> where it comes from, for every weight of `spec`, in the order of the forward pass.

        Raises FormatError naming the tensors that are missing from `names`, or left over in it."""
        assert isinstance(spec, EncoderSpec)
        table = self._table(spec, names)
        out = {name: _derive(name, weight.shape, table, names) for name, weight in weight_specs(spec).items()}
        used = {derive.source for derive in out.values()}
        none_left([name for name in used if name not in names], "lacks", "Fetch the whole model again")
        masked = spec.classifier is None
        left = [
            name for name in names
            if name not in used and not IGNORED.fullmatch(name) and not (masked and MASKED_HEAD.fullmatch(name))
        ]  # fmt: skip
        none_left(left, f"has, beyond what {self.name} uses,", "Check config.json: it describes another model")
        return out

    def _table(self, spec: EncoderSpec, names: Collection[str]) -> dict[str, str]:
        """Canonical stem -> source stem, with the prefix that this checkpoint has."""
        if f"{GGUF['embed']}.weight" in names:
            return dict(GGUF)
        body = {canonical: str(stem) for canonical, stem in self.hf_names.items()}
        prefix = self.prefix if f"{self.prefix}{body['embed']}.weight" in names else ""
        tokens = spec.classifier is not None and spec.classifier.tokens and not spec.classifier.dense
        heads = TOKEN_HEAD if tokens else self.heads
        table = {canonical: prefix + stem for canonical, stem in body.items()}
        table |= {canonical: stem.replace(BODY, prefix) for canonical, stem in heads.items()}
        return table | {f"dense.{k}": f"{DENSE}.{k}.linear" for k in range(len(spec.pooling.dense))}


def _derive(name: str, shape: tuple[int, ...], table: Mapping[str, str], names: Collection[str]) -> Derive:
    """One weight: its stem looked up, its part of a fused tensor taken."""
    stem, suffix = name, "weight"
    if name == RELATIVE:
        stem = "relative"
    elif name.endswith((".weight", ".bias")):
        stem, _, suffix = name.rpartition(".")
    layer = re.match(r"layers\.(\d+)\.", stem)
    found = table[re.sub(r"^layers\.\d+", "layers.{i}", stem)].format(i=layer[1] if layer else "")
    source, _, part = found.partition("|")
    tensor = f"{source}.{suffix}"
    older = f"{source}.{'gamma' if suffix == 'weight' else 'beta'}"  # norms of checkpoints made before 2019
    if tensor not in names and older in names:
        tensor = older
    if not part:
        return Derive(tensor, shape, shape)
    index, count = map(int, part.split("/"))
    whole = (shape[0] * count, *shape[1:])
    return Derive(tensor, whole, shape, rows=Rows(1, whole[0], index * shape[0], shape[0]))
