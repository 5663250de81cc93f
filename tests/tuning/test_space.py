"""Search spaces: RecBole's syntax, what is refused, and what the package ships."""

import math

import pytest

from recbole_mm.config import PROPERTIES, Config
from recbole_mm.errors import InputError
from recbole_mm.tuning.space import check_space, default_space, grid, read_space

SHIPPED = sorted((PROPERTIES / "hyper").glob("*.test"))

# hyper.test of RecBole's repository, and a line with the spaces that its reader takes out
RECBOLES = """\
learning_rate loguniform -8,0
embedding_size choice [64,96,128]
train_batch_size choice [512, 1024, 2048]
mlp_hidden_size choice ['[64,64,64]','[128, 128]']
dropout_prob quniform 0.1,0.5,0.1

weight_decay uniform 0, 0.1
"""


def space_of(tmp_path, text):
    path = tmp_path / "hyper.test"
    path.write_text(text)
    return read_space(path)


def checked(tmp_path, text, model="SASRecFast", command_line=()):
    config = Config(model, "tiny", command_line=command_line)
    return check_space(space_of(tmp_path, text), config, command_line)


def test_recboles_syntax_is_read(tmp_path):
    space = space_of(tmp_path, RECBOLES)
    assert {name: (p.kind, p.values) for name, p in space.items()} == {
        "learning_rate": ("loguniform", (-8.0, 0.0)),
        "embedding_size": ("choice", (64, 96, 128)),
        "train_batch_size": ("choice", (512, 1024, 2048)),
        "mlp_hidden_size": ("choice", ("[64,64,64]", "[128, 128]")),
        "dropout_prob": ("quniform", (0.1, 0.5, 0.1)),
        "weight_decay": ("uniform", (0.0, 0.1)),
    }
    assert space["learning_rate"].bounds == (math.exp(-8), 1)
    assert space["dropout_prob"].steps() == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recbole_reads_the_files_of_the_package(path):
    pytest.importorskip("hyperopt")
    from recbole.trainer import HyperTuning

    theirs = HyperTuning(None, params_file=path, algo="random").space
    assert list(theirs) == list(read_space(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_spaces_of_the_package_hold_the_defaults_of_their_models(path):
    config = Config(path.stem, "tiny")
    for name, parameter in check_space(read_space(default_space(path.stem)), config, ()).items():
        default = config[name]
        if parameter.kind == "choice":
            assert default in parameter.values
        else:
            low, high = parameter.bounds
            assert low <= default <= high


def test_every_model_of_the_issue_has_a_space():
    assert {"MUFASA", "CAMMSR", "MDSRec", "SASRecMM", "SASRec"} <= {p.stem for p in SHIPPED}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate", "expected `name kind value`.*no kind, which is one of choice, uniform"),
        ("learning_rate normal 0,1", "normal is none of choice"),
        ("learning_rate uniform", "uniform needs two numbers"),
        ("learning_rate uniform 0.1", "1 numbers"),
        ("learning_rate uniform 0.1,0.2,0.3", "3 numbers"),
        ("learning_rate uniform 0.2,0.1", "low must be below high"),
        ("learning_rate uniform 0,inf", "low must be below high, both finite"),
        ("learning_rate uniform a,b", "could not convert"),
        ("learning_rate loguniform 1,1000", "these are logarithms"),
        ("n_layers quniform 1,3,0", "the step must be positive"),
        ("n_layers choice", "choice needs a list"),
        ("n_layers choice 3", "not a list"),
        ("n_layers choice []", "not a list with an entry"),
        ("n_layers choice [1,2", "a literal"),
        ("n_layers choice [1,2,1]", "1 stands in it twice"),
        ("n_layers choice list(range(3))", "malformed"),
        ("n_layers choice __import__('pathlib').Path('evaluated').touch()", "malformed"),
        ("seed2 choice [1]\nseed2 choice [2]", "line 4: seed2 stands in line 3 already"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        space_of(tmp_path, f"# a comment\n\n{line}\n")
    assert "hyper.test, line " in str(caught.value)
    assert not (tmp_path / "evaluated").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n_layer choice [1,2]", "SASRecFast does not read 'n_layer'; did you mean 'n_layers'"),
        ("n_experts choice [1,2]", "SASRecFast does not read 'n_experts'"),
        ("seed choice [1,2]", "seed is no hyper-parameter"),
        ("topk choice [[5],[10]]", "topk is no hyper-parameter"),
        ("mask_history choice [True,False]", "mask_history is no hyper-parameter"),
        ("user_inter_num_interval choice ['[5,inf)']", "is no hyper-parameter"),
        ("n_layers choice [1,2.5]", "n_layers must be of type int, got 2.5"),
        ("n_layers uniform 1,3", "n_layers must be of type int"),
        ("n_layers quniform 1,3,0.5", "takes integers; choose a whole step"),
        ("hidden_act choice [1]", "hidden_act must be of type str"),
        ("weight_decay choice ['much']", "weight_decay must be of type float"),
        ("train_objective uniform 0,1", "train_objective must be of type str"),
    ],
)
def test_what_the_model_would_not_take_is_refused_before_the_first_trial(tmp_path, line, message):
    with pytest.raises(InputError, match=message) as caught:
        checked(tmp_path, line)
    assert "line 1" in str(caught.value)


def test_a_key_on_the_command_line_would_win_over_every_trial(tmp_path):
    with pytest.raises(InputError, match="n_layers is also on the command line"):
        checked(tmp_path, "n_layers choice [1,2]", command_line=["--n_layers=1"])


def test_values_reach_the_configuration_in_its_types(tmp_path):
    text = "n_layers quniform 1,4,1\nhidden_dropout_prob quniform 0.1,0.3,0.1\n"
    space = checked(tmp_path, text + "modalities choice [['text'],['text','image']]\n")
    assert [space["n_layers"].value(x) for x in (1.0, 4.0)] == [1, 4]
    assert isinstance(space["n_layers"].value(1.0), int)
    assert space["hidden_dropout_prob"].value(0.1 * 3) == 0.3
    second = space["modalities"].labels[1]
    assert isinstance(second, str)  # what a database can store
    assert space["modalities"].value(second) == ["text", "image"]


def test_a_grid_is_every_combination_once(tmp_path):
    space = space_of(tmp_path, "a choice [1,2]\nb choice ['x','y','z']\nc quniform 0,1,0.5\n")
    points = grid(space)
    assert len(points) == len({tuple(point.values()) for point in points}) == 18
    assert points[0] == {"a": 1, "b": "x", "c": 0}
    assert points[1]["c"] == 0.5
    with pytest.raises(InputError, match="line 1: an exhaustive search needs choice or quniform"):
        grid(space_of(tmp_path, "learning_rate loguniform -8,-5"))


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_key(tmp_path):
    assert list(space_of(tmp_path, "\ufeffn_layers choice [1,2]\n")) == ["n_layers"]


def test_a_missing_space_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no search space for GRU4Rec.*SASRec"):
        default_space("GRU4Rec")
    with pytest.raises(InputError, match="cannot be read"):
        read_space(tmp_path / "none.test")
    with pytest.raises(InputError, match="holds no parameter"):
        space_of(tmp_path, "# nothing\n")
