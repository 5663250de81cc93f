import torch

from recbole_mm.data.categories import CategoryTable


def test_rows_are_the_categories_of_their_item():
    table = CategoryTable.from_lists([(), ["b", "a"], (), ["c"], ["a", "a"]])
    assert table.names == ("a", "b", "c")
    assert table.multi_hot.dtype == torch.bool
    assert table.multi_hot.int().tolist() == [
        [0, 0, 0],
        [1, 1, 0],
        [0, 0, 0],
        [0, 0, 1],
        [1, 0, 0],
    ]


def test_names_do_not_depend_on_the_order_of_the_items():
    rows = [["z"], ["m", "a"], ["b"]]
    assert CategoryTable.from_lists(rows).names == CategoryTable.from_lists(rows[::-1]).names


def test_no_category_at_all_gives_no_column():
    table = CategoryTable.from_lists([(), ()])
    assert table.names == ()
    assert table.multi_hot.shape == (2, 0)
