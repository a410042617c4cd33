"""Lists of nodes as Slurm writes them, read without its programs."""

import pytest

from autotune.slurm import expand_nodelist


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-2,5,09-11]", ["n1", "n2", "n5", "n09", "n10", "n11"]),
        ("a1,b[1-2] c", ["a1", "b1", "b2", "c"]),
        ("n[1,1],n1", ["n1", "n1", "n1"]),
        ("rack[0-1]n[08-09]", ["rack0n08", "rack0n09", "rack1n08", "rack1n09"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("gpu-a[1-2].site", ["gpu-a1.site", "gpu-a2.site"]),
        ("[7-8]", ["7", "8"]),
    ],
)
def test_a_list_of_nodes_is_expanded(nodelist: str, names: list[str]) -> None:
    assert list(expand_nodelist(nodelist)) == names


@pytest.mark.parametrize(
    ("nodelist", "said"),
    [
        ("", "names none"),
        (" ,", "names none"),
        ("n[1-2", "no partner"),
        ("n1]", "no partner"),
        ("n[]", "no range"),
        ("n[3-1]", "'3-1' is no range"),
        ("n[1-]", "no range"),
        ("n[a-b]", "no range"),
        ("n[0-99999]", "more than 65536"),
        ("n[0-999]m[0-999]", "more than 65536"),
        ("n[0-" + "9" * 18 + "]", "more than 65536"),
        ("n[0-" + "9" * 19 + "]", "no range"),
    ],
)
def test_what_is_no_list_of_nodes_is_refused(nodelist: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        expand_nodelist(nodelist)
