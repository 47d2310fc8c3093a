"""examples/text_domains.py: what is in a part, and that no document is in both."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import text_domains as example  # noqa: E402

INSTALLED = list(example.DEFAULT)


@pytest.fixture(scope="module")
def texts() -> dict[str, example.Text]:
    return example.domains(max_bytes=200_000)


def test_documents_are_in_one_part(texts):
    assert list(texts) == INSTALLED
    for text in texts.values():
        train, test = text.train_documents, text.test_documents
        assert len(train) > 10
        assert len(test) > 1
        assert not set(train) & set(test)
        assert example.LEAST <= len(text.test) <= 20_000
        assert len(text.train) <= 200_000


def test_parts_are_the_documents(texts):
    for name, text in texts.items():
        contents = dict(example.DOMAINS[name]())
        for part, documents in ((text.train, text.train_documents), (text.test, text.test_documents)):
            whole = b"".join(contents[document][: example.MOST] + example.END for document in documents)
            assert bytes(part.tolist()) == whole[: len(part)]


def test_a_part_does_not_depend_on_the_size():
    small, large = (example.domains(["python"], size)["python"] for size in (100_000, 300_000))
    assert small.train_documents == large.train_documents[: len(small.train_documents)]
    assert bytes(small.test.tolist()) == bytes(large.test[: len(small.test)].tolist())


def test_a_copy_under_another_name_is_left_out(monkeypatch):
    names = [str(n) for n in range(400)]
    monkeypatch.setitem(example.DOMAINS, "copies", lambda: ((name, name.zfill(3).encode() * 500) for name in names))
    monkeypatch.setitem(example.DOMAINS, "twice", lambda: ((f"{p}{n}", n.zfill(3).encode() * 500) for p in "ab" for n in names))
    once, twice = example.domains(["copies"])["copies"], example.domains(["twice"])["twice"]
    assert len(once.train) + len(once.test) == len(twice.train) + len(twice.test) == 400 * 1501


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["python", "poems"],), r"names\[1\] is 'poems'"),
        ((["python", "python"],), "each once"),
        (([],), "one or more"),
        ((["python"], 99_999), "max_bytes is 99999"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        example.domains(*arguments)


def test_a_domain_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(example.DOMAINS, "empty", lambda: iter([("a", b"few bytes")]))
    with pytest.raises(ValueError, match="part of the domain empty has"):
        example.domains(["empty"])


@pytest.mark.skipif(find_spec("qm9pack") is None, reason="qm9pack is not installed")
def test_molecules():
    text = example.domains(["smiles"], 100_000)["smiles"]
    assert bytes(text.train[:6].tolist()) == b"C\0N\0O\0"
