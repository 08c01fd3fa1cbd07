"""Small folders of encoders, as sentence-transformers and transformers write them, with their originals."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors.torch import save_file

F32 = npt.NDArray[np.float32]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the",
         "cat", "sat", "on", "mat", "dog", "runs", "far", "?", ".", ","]  # fmt: skip
TEXTS = ["the cat sat on the mat.", "a dog runs far", "the", "where, the dog? on a mat", "zebra"]
SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "vocab_size": len(WORDS),
}  # fmt: skip


class Original:
    """A random BERT of transformers (class `name`; or another, of class `config`) with its tokenizer, in a folder."""

    def __init__(self, folder: Path, name: str = "BertModel", config: str = "BertConfig", **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(1)
        torch.set_num_threads(1)
        made: Any = transformers
        self.model = getattr(made, name)(getattr(made, config)(**SIZE | settings)).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape)
                parameter.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.2)
        self.model.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        self.tokenizer = made.BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
        self.tokenizer.save_pretrained(folder)

    def output(self, *texts: str) -> Any:
        """What the model says of one text, or of a pair."""
        given = self.tokenizer(*texts, return_tensors="pt")
        if self.model.config.model_type != "bert":
            given.pop("token_type_ids")
        with torch.no_grad():
            return self.model(**given)

    def mean(self, text: str) -> F32:
        """The mean of the last layer's rows."""
        return np.asarray(self.output(text).last_hidden_state[0].mean(0).numpy())


def add_modules(
    folder: Path,
    *,
    mode: str = "mean_tokens",
    normalize: bool = False,
    dense: torch.nn.Linear | None = None,
    prompts: dict[str, str] | None = None,
    longest: int = 0,
) -> None:
    """Writes modules.json and what it names."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    kinds += [("2_Dense", "Dense")] if dense is not None else []
    kinds += [(f"{len(kinds)}_Normalize", "Normalize")] if normalize else []
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling: dict[str, Any] = {f"pooling_mode_{name}": name == mode for name in modes}
    write(folder / "1_Pooling" / "config.json", pooling | {"word_embedding_dimension": 32})
    if dense is not None:
        write(folder / "2_Dense" / "config.json", {
            "in_features": dense.in_features, "out_features": dense.out_features, "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh"})  # fmt: skip
        weights = {"linear.weight": dense.weight.detach(), "linear.bias": dense.bias.detach()}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
    if prompts:
        write(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": None})
    if longest:
        write(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def unit(vector: F32) -> F32:
    """Of length 1."""
    return vector / np.linalg.norm(vector)


def close(ours: Sequence[F32] | F32, theirs: Sequence[F32] | F32, most: float = 1e-4) -> bool:
    """max|a - b| / max|b| below `most`."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return a.shape == b.shape and float(np.abs(a - b).max() / np.abs(b).max()) < most
