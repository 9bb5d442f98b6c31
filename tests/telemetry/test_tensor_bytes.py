"""tensor_report: bytes by kind, shared storage counted as duplicate."""

import torch

from fp4lab.telemetry.tensor_bytes import tensor_report

K = 1 << 18  # float32 elements in one MiB


def rows(**groups) -> dict:
    return {(r.tensor_kind, r.dtype): (r.count, r.mib, r.duplicate_mib) for r in tensor_report(groups)}


def test_kinds_and_dtypes_have_rows_of_their_own():
    found = rows(w=[torch.zeros(K), torch.zeros(2 * K)], m=[torch.zeros(K, dtype=torch.uint8)])
    assert found == {("w", "float32"): (2, 3.0, 0.0), ("m", "uint8"): (1, 0.25, 0.0)}


def test_largest_row_first():
    report = tensor_report({"small": [torch.zeros(K)], "large": [torch.zeros(3 * K)], "middle": [torch.zeros(2 * K)]})
    assert [r.tensor_kind for r in report] == ["large", "middle", "small"]
    assert {r.device for r in report} == {"cpu"}


def test_a_second_name_for_one_storage_is_a_duplicate():
    t = torch.zeros(4 * K)
    assert rows(param=[t], state=[t.detach()]) == {("param", "float32"): (1, 4.0, 0.0), ("state", "float32"): (1, 4.0, 4.0)}
    assert rows(param=[t, t]) == {("param", "float32"): (2, 8.0, 4.0)}


def test_another_dtype_of_the_same_bytes_is_a_duplicate():
    t = torch.zeros(4 * K)
    assert rows(a=[t], b=[t.view(torch.uint8)])["b", "uint8"] == (1, 4.0, 4.0)


def test_disjoint_views_are_no_duplicates():
    t = torch.zeros(4 * K)
    assert rows(v=[t[: 2 * K], t[2 * K :]]) == {("v", "float32"): (2, 4.0, 0.0)}


def test_overlapping_views_count_the_overlap():
    t = torch.zeros(4 * K)
    assert rows(v=[t[: 3 * K], t[2 * K :]]) == {("v", "float32"): (2, 5.0, 1.0)}
    assert rows(v=[t, t[K : 2 * K]]) == {("v", "float32"): (2, 5.0, 1.0)}


def test_equal_values_in_two_storages_are_no_duplicates():
    t = torch.ones(K)
    assert rows(v=[t, t.clone()]) == {("v", "float32"): (2, 2.0, 0.0)}


def test_a_part_seen_twice_is_not_counted_beyond_its_size():
    t = torch.zeros(4 * K)
    assert rows(v=[t[: 3 * K], t[K:], t[K : 3 * K]]) == {("v", "float32"): (3, 8.0, 4.0)}


def test_nothing():
    assert tensor_report({}) == [] and tensor_report({"empty": []}) == []
