"""The machines that a table's protocol names."""

from __future__ import annotations

from qdiff.cli.run_manifest import Manifest
from qdiff.cli.table_numbers import machine_of
from qdiff.cli.table_protocol import machines_text


def rows(**machines: str) -> list[dict]:
    return [{"label": label, "machine": machine} for label, machine in machines.items()]


def test_one_machine_has_no_rows_beside_it():
    assert machines_text(rows(float="A", w4="A")) == "A"


def test_rows_of_another_machine_are_named():
    results = rows(float="B", w8="A", w4="B", gptq="C", grip="A", dmq="B")
    assert machines_text(results) == "B, but A for w8, grip, but C for gptq"


def test_of_two_machines_with_as_many_rows_the_order_is_fixed():
    assert machines_text(rows(float="B", w4="A")) == machines_text(rows(w4="A", float="B")) == "A, but B for float"


def test_a_run_names_its_cpu_unless_it_is_of_an_earlier_version():
    run = Manifest({}, torch_threads=1, device="cpu", packages={"torch": "2.0"}, machine={"cpus": 2})
    assert machine_of(run) == "2 CPUs, 1 thread(s), device cpu, torch 2.0"
    run.machine["cpu"] = "AMD EPYC, AVX2"
    assert machine_of(run) == "2 CPUs (AMD EPYC, AVX2), 1 thread(s), device cpu, torch 2.0"
