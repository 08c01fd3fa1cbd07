"""Two texts as one input: ids, token types and cuts equal those of transformers on real vocabularies."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.model.tokens.load import load_tokenizer
from inhouse.model.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.null, pytest.mark.realdata]

Load = Callable[[str], Tokenizer]
TEXTS = [
    ("Where is the library?", "Behind the town hall, on the left."),
    ("a", "The second is much longer than the first, so it alone is cut when both must fit into little room."),
    ("The first is much longer than the second, so it alone is cut when both must fit into little room.", "b"),
    ("One two three four five six seven", "one two three four five six seven eight"),
    ("", "only the second"),
    ("naïve café 東京", "€ 5,00 — ok?"),
]


@pytest.fixture(scope="module")
def oracles(tokenizer_files: Callable[[str], Path]) -> dict[str, Any]:
    made: Any = transformers  # its types know neither class
    bert = made.BertTokenizerFast(vocab=str(tokenizer_files("bert-cased") / "vocab.txt"), do_lower_case=False)
    roberta = made.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_files("roberta-base") / "tokenizer.json"))
    return {"bert-cased": bert, "roberta-base": roberta}


@pytest.mark.parametrize("name", ["bert-cased", "roberta-base"])
@pytest.mark.parametrize("most", [None, 30, 16, 15, 11, 8, 5])
def test_pairs_equal_transformers(name: str, most: int | None, load_named: Load, oracles: dict[str, Any]) -> None:
    tokenizer = load_named(name)
    pair = tokenizer.specials.pair
    assert pair is not None
    for first, second in TEXTS:
        kept = {} if most is None else {"truncation": "longest_first", "max_length": most}
        wanted = oracles[name](first, second, return_token_type_ids=True, **kept)
        assert tokenizer.encode_pair(first, second, most) == (wanted["input_ids"], wanted["token_type_ids"])


def test_pairs_survive_the_compiled_form(tokenizer_files: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tokenizer_files("roberta-base")
    plain, first, again = load_tokenizer(folder), load_tokenizer(folder, tmp_path), load_tokenizer(folder, tmp_path)
    assert any(tmp_path.iterdir())
    assert plain.specials.pair == first.specials.pair == again.specials.pair != None  # noqa: E711
    assert again.encode_pair("a b", "c") == plain.encode_pair("a b", "c")


def test_a_pair_without_room_or_rule_is_refused(load_named: Load) -> None:
    with pytest.raises(UsageError, match="no room for two texts"):
        load_named("bert-cased").encode_pair("a", "b", most=2)
    with pytest.raises(UnsupportedError, match="does not say how two texts stand together"):
        load_named("gpt2").encode_pair("a", "b")
