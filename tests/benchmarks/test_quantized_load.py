"""benchmarks/quantized_load.py: medians and ratios of what its processes report."""

import json

from benchmarks import quantized_load


def test_medians_are_those_of_each_time_over_the_processes():
    runs = [{"load": 3.0, "read": 1.0}, {"load": 1.0, "read": 9.0}, {"load": 2.0, "read": 5.0}]
    assert quantized_load.medians(runs) == {"load": 2.0, "read": 5.0}


def test_table_has_ratios_to_plain_weights():
    lines = quantized_load.table({"plain": {"load": 2.0}, "kept int4": {"load": 5.0}}).splitlines()
    assert lines[0] == "| weights | load |"
    assert lines[2:] == ["| plain | 1.00× |", "| kept int4 | 2.50× |"]


def test_measure_runs_the_cases_in_turns(monkeypatch, tmp_path):
    calls = []

    class Finished:
        stdout = json.dumps({"load": 1.0})

    def recorded(command, **options):
        calls.append(tuple(command[3:5]))
        return Finished

    monkeypatch.setattr(quantized_load.subprocess, "run", recorded)
    folders = {name: tmp_path / name for name in ("plain", "kept8", "kept4")}
    seconds = quantized_load.measure(folders, 2, 1)
    assert seconds == {name: {"load": 1.0} for name in quantized_load.CASES}
    expected = [
        (str(folders[folder]), quantize) for folder, quantize in quantized_load.CASES.values()
    ]
    assert calls == expected * 2
