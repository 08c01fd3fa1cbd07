"""Any spec to its weights and Programs: says which builder writes which kind of model."""

import math

from inhouse.model import decoder, encoder, seq2seq
from inhouse.model.encoder import EncoderSpec
from inhouse.model.seq2seq import Seq2SeqSpec
from inhouse.model.spec import ModelSpec
from inhouse.runtime.program import ProgramSet, WeightSpec

Spec = ModelSpec | EncoderSpec | Seq2SeqSpec  # each has family, vocab_size, context_length and hidden


def weight_specs(spec: Spec) -> dict[str, WeightSpec]:
    """Every canonical weight of the model, in the order of the forward pass."""
    match spec:
        case ModelSpec():
            return decoder.weight_specs(spec)
        case EncoderSpec():
            return encoder.encoder_weights(spec)
        case Seq2SeqSpec():
            return seq2seq.weight_specs(spec)


def build(spec: Spec) -> ProgramSet:
    """The Programs of a model, its weights, constants and state groups."""
    match spec:
        case ModelSpec():
            return decoder.build(spec)
        case EncoderSpec():
            return encoder.build_encoder(spec)
        case Seq2SeqSpec():
            return seq2seq.build(spec)


def parameters(spec: Spec) -> int:
    """Parameters in all; a tied embedding counts once."""
    return sum(math.prod(weight.shape) for weight in weight_specs(spec).values())


def kv_bytes_per_token(programs: ProgramSet, element_bytes: int) -> int:
    """Bytes that one position takes over all layers, with `element_bytes` an element."""
    return sum(group.bytes_per_token(element_bytes) for group in programs.groups)
