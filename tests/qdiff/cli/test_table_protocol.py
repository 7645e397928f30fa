"""The machines that a table's protocol names."""

from __future__ import annotations

from qdiff.cli.run_manifest import Manifest
from qdiff.cli.table_numbers import machine_of
from qdiff.cli.table_protocol import machines_text


def text(*rows: tuple[str, str], groups: dict[str, str] | None = None) -> str:
    """The text of rows (label, machine); seeds of a row by the label of its group."""
    results = [{"label": label, "machine": machine} for label, machine in rows]
    return machines_text(results, {label: (groups or {}).get(label) for label, _ in rows})


def test_one_machine_has_no_rows_beside_it():
    assert text(("float", "A"), ("w4", "A")) == "A"


def test_rows_of_another_machine_are_named():
    named = text(("float", "B"), ("w8, wide", "A"), ("w4", "B"), ("gptq", "C"), ("grip", "A"), ("dmq", "B"))
    assert named == "B; but A: “w8, wide”, “grip”; but C: “gptq”"


def test_of_two_machines_with_as_many_rows_the_order_is_fixed():
    assert text(("float", "B"), ("w4", "A")) == text(("w4", "A"), ("float", "B")) == "A; but B: “float”"


def test_a_row_of_several_seeds_is_named_once_unless_its_seeds_are_of_several_machines():
    groups = {"q seed 1": "q", "q seed 2": "q", "g seed 1": "g", "g seed 2": "g"}
    seeds = (("q seed 1", "B"), ("q seed 2", "B"), ("g seed 1", "A"), ("g seed 2", "B"))
    assert text(("float", "A"), ("w8", "A"), ("w4", "A"), *seeds, groups=groups) == "A; but B: “q”, “g seed 2”"


def test_a_run_names_its_cpu_unless_it_is_of_an_earlier_version():
    run = Manifest({}, torch_threads=1, device="cpu", packages={"torch": "2.0"}, machine={"cpus": 2})
    assert machine_of(run) == "2 CPUs, 1 thread(s), device cpu, torch 2.0"
    run.machine["cpu"] = "AMD EPYC, AVX2"
    assert machine_of(run) == "2 CPUs (AMD EPYC, AVX2), 1 thread(s), device cpu, torch 2.0"
