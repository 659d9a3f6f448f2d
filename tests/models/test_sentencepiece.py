# SPDX-License-Identifier: Apache-2.0
"""Texts are cut as SentencePiece cuts them, whatever its model says; damaged models are errors."""

import io
import json
import random
import warnings

import pytest

from fastattn.models._character_map import CharacterMap
from fastattn.models._sentencepiece import SentencePieces, sentence_pieces

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")

LEARNED = [
    *("двадцать три тысячи сто", "hello world, it's fine", "a  b   c ab"),
    *("ﬁ \uff11\uff12\uff13 ½ Å", "naïve 日本語", "the cat sat on the mat"),
] * 50
MODELS = {
    "usual": {},
    "user-defined": dict(user_defined_symbols=["<x>", "ab"]),
    "bytes": dict(byte_fallback=True, vocab_size=340),
    "without-a-space-before": dict(add_dummy_prefix=False),
    "all-spaces": dict(remove_extra_whitespaces=False),
    "as-it-is": dict(normalization_rule_name="identity"),
    "lower-case": dict(normalization_rule_name="nmt_nfkc_cf"),
}
ALPHABET = "abc hello двадцать ,'  \t日ﬁ½\uff11ÅA<x>語é😀\u0301\u2581\xb4"


def trained(**options):
    """Return the model of SentencePiece that it learns of some texts."""
    model, usual = io.BytesIO(), dict(vocab_size=90, hard_vocab_limit=False, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LEARNED), model_writer=model, **usual | options
    )
    return model.getvalue()


def ids_of(model):
    """Return ids for the pieces of a model, which are not its own."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    return {name: i for i, name in enumerate(sorted(names))}


def write(folder, model, **vocab):
    """Write a folder's files of a tokenizer."""
    (folder / "source.spm").write_bytes(model)
    (folder / "vocab.json").write_text(json.dumps(ids_of(model) | vocab))
    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return trained(**MODELS[request.param])


def some_texts(count):
    """Return texts of letters that are known, changed, or unknown."""
    draw = random.Random(0)
    texts = ["", " ", "  a b ", "hello<x>world", "日本 hello 語語", "</s> <unk> <s> x", "\ta\n b"]
    return texts + ["".join(draw.choices(ALPHABET, k=draw.randrange(25))) for _ in range(count)]


def test_texts_are_cut_as_sentencepiece_cuts_them(model):
    theirs, vocab = sentencepiece.SentencePieceProcessor(model_proto=model), ids_of(model)
    ours = SentencePieces(model, vocab, vocab)
    for text in some_texts(5000):
        expected = theirs.encode(text, out_type=str)
        found = ours.encode(text)
        assert found.tokens == [*expected, "</s>"]
        assert found.ids == [vocab.get(x, vocab["<unk>"]) for x in found.tokens]
        assert ours.encode(text, add_special_tokens=False) == (found.ids[:-1], found.tokens[:-1])
        if vocab["<unk>"] not in found.ids:
            assert ours.decode(found.ids) == theirs.decode(expected).strip()


def test_tokens_are_those_of_marian_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    model = trained()
    vocab = {**ids_of(model), "<pad>": 200, ">>fra<<": 201, ">>de<<": 202}
    write(tmp_path, model, **vocab)
    (tmp_path / "target.spm").write_bytes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It recommends to normalise punctuation.
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
    ours = sentence_pieces(tmp_path)
    texts = [">>fra<< the cat", ">>de<<", ">>xx<< a", "a >>fra<< b", *some_texts(300)[7:]]
    for text in texts:
        ids = theirs(text).input_ids
        assert ours.encode(text).ids == ids
        assert ours.decode([*ids, 200]) == theirs.decode([*ids, 200], skip_special_tokens=True)
    assert (ours.id_to_token(201), ours.token_to_id(">>de<<")) == (">>fra<<", 202)


def test_what_is_written_may_have_ids_of_its_own(tmp_path):
    write(tmp_path, trained())
    written = {"</s>": 0, "<unk>": 1, "▁le": 2, "▁chat": 3, "<pad>": 4}
    (tmp_path / "target_vocab.json").write_text(json.dumps(written))
    ours = sentence_pieces(tmp_path)
    assert ours.decode([2, 3, 0, 4, 77]) == "le chat"
    assert ours.encode("the").ids[0] == ours.token_to_id(ours.encode("the").tokens[0])


# What goes wrong.


def field(number, value):
    """Return a field of a message: an integer below 128, or bytes."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def piece(text, score=b"\0\0\x80\xbf", kind=1):
    """Return a piece of a model."""
    fields = field(1, text) + bytes([2 << 3 | 5]) + score + field(3, kind)
    return field(1, fields)


UNKNOWN, WORD = piece(b"<unk>", kind=2), piece("▁a".encode())


def test_spaces_that_end_pieces_are_refused(tmp_path):
    model = trained(treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match=r"source.spm: spaces must begin its pieces, and end them"):
        write_by_hand(tmp_path, model)


@pytest.mark.parametrize("known", [0, 0x100])  # whether a text ends there
def test_few_characters_become_few(known):
    # "a" leads to the node of "a", again and again.
    units = [0] * 97 + [97 | known | 97 << 10]
    trie = b"".join(x.to_bytes(4, "little") for x in [4 * len(units), *units])
    changed = CharacterMap(trie + b"b" * 1000 + b"\0")
    assert changed("a" * 1000 + "c") == ("b" if known else "a") * 1000 + "c"
    with pytest.raises(ValueError, match=r"^characters that become others must be at most 1000 by"):
        changed("a" * 1001)
    with pytest.raises(ValueError, match=r"^characters must become at most 1000 bytes"):
        CharacterMap(trie + b"\0" + b"b" * 1001)


def test_a_model_is_read_by_hand(tmp_path):
    assert write_by_hand(tmp_path, UNKNOWN + WORD).encode("a b").tokens == ["▁a", "▁b", "</s>"]


def write_by_hand(folder, model):
    (folder / "source.spm").write_bytes(model)
    (folder / "vocab.json").write_text('{"</s>": 0, "<unk>": 1}')
    return sentence_pieces(folder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (b"", "its pieces must be normal ones, and one that stands for all others"),
        (WORD, "its pieces must be normal ones, and one .*"),
        (UNKNOWN, "its pieces must be normal ones, and one .*"),
        (UNKNOWN * 2 + WORD, "its pieces must be normal ones, and one .*"),
        (UNKNOWN + WORD + field(2, field(3, 2)), "the kind of its model must be 1, unigram, got 2"),
        (UNKNOWN + WORD + field(3, field(5, 0)), "spaces must be spelt \u2581 in its pieces, .*"),
        (UNKNOWN + WORD + field(2, 3), "a field must be a message, got 3"),
        (UNKNOWN + field(1, 7), "a field must be a message, got 7"),
        (UNKNOWN + field(1, field(3, 1)), "a piece must be a text and a score, got {3: 1}"),
        (UNKNOWN + field(1, field(1, 4)), "a piece must be a text and a score, got {1: 4}"),
        (UNKNOWN + piece(b"a", b"\0\0\xc0\x7f"), "the score of a piece must be finite, got nan"),
        (UNKNOWN + piece(b"\xff"), "a piece must be UTF-8, got .*"),
        (WORD + b"\x0a\x7fab", "a field must end within the 19 bytes .* 127 bytes at 17"),
        (WORD + b"\x0b", "the kind of a field must be 0, 1, 2 or 5, got 3"),
        (WORD + b"\xff", "an integer must end within 10 bytes and its message, got none at 15"),
        (b"\xff" * 99, "an integer must end within 10 bytes and its message, got none at 0"),
        (UNKNOWN + WORD + field(3, field(2, 3)), "its table of characters must be bytes, got 3"),
        (UNKNOWN + WORD + field(3, field(2, b"xyz")), "the trie of its characters must be a .*"),
        (UNKNOWN + WORD + field(3, field(2, b"\x05\0\0\0xyzxyz")), "the trie .*, got 5"),
    ],
)  # fmt: skip
def test_models_that_are_none_are_refused(model, message, tmp_path):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/source.spm: {message}$"):
        write_by_hand(tmp_path, model)


def test_a_damaged_model_is_an_error_or_another_model(tmp_path):
    model, draw = trained(vocab_size=60), random.Random(0)
    refused = []
    for _ in range(300):
        place = draw.randrange(len(model))
        damaged = model[:place]
        if draw.random() < 0.7:
            damaged += bytes([draw.randrange(256)]) + model[place + 1 :]
        try:
            write_by_hand(tmp_path, damaged).encode("hello two\uff13 ½")
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert max(map(len, refused)) < 1000


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"<unk>": 1}, "it must hold </s>, and does not"),
        ({"</s>": 1}, "it must hold <unk>, and does not"),
        ({"</s>": 1, "<unk>": -1}, "'<unk>' must be an integer from 0 to .*, got -1"),
        ({"</s>": 1, "<unk>": "2"}, "'<unk>' must be an integer from 0 to .*, got '2'"),
        ([], "its JSON must be an object, .*"),
    ],
)
def test_ids_that_are_none_are_refused(vocab, message, tmp_path):
    (tmp_path / "source.spm").write_bytes(UNKNOWN + WORD)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/vocab.json: {message}$"):
        sentence_pieces(tmp_path)
