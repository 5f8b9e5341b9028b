"""The doctor: every check answers on any host, says what to do when something is amiss, and changes nothing."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tickmesh.ops import doctor


def test_every_check_answers() -> None:
    found = doctor.checks()
    assert len({check.name for check in found}) == len(doctor.CHECKS) == len(found)
    for check in found:
        assert check.status in ("ok", "warn", "fail")
        assert check.found
        assert (check.advice == "") == (check.status == "ok"), check


def test_output_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    failed = any(check.status == "fail" for check in doctor.checks())
    assert doctor.run(json_output=True) == int(failed)
    names = [check["name"] for check in json.loads(capsys.readouterr().out)]
    assert doctor.run() == int(failed)
    text = capsys.readouterr().out
    assert all(name in text for name in names)


def test_nothing_readable_is_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_text", lambda path: "")
    assert len(doctor.checks()) == len(doctor.CHECKS)


@pytest.mark.parametrize(
    ("files", "check", "status", "part"),
    [
        ({"isolated": "2-3,6", "nohz_full": "2-3"}, doctor.check_isolated_cores, "ok", "[2, 3, 6]"),
        ({"isolated": "", "nohz_full": ""}, doctor.check_isolated_cores, "warn", "none"),
        ({"current_clocksource": "hpet"}, doctor.check_clock, "warn", "hpet"),
        ({"current_clocksource": "tsc", "cpuinfo": "flags\t: constant_tsc nonstop_tsc"}, doctor.check_clock, "ok", "steady"),
        ({"rmem_max": "212992"}, doctor.check_socket_buffers, "warn", "212992"),
        ({"rmem_max": "67108864"}, doctor.check_socket_buffers, "ok", "67108864"),
        ({"status": "CapEff:\t0000000000002000"}, doctor.check_net_raw, "ok", "held"),
        ({"status": "CapEff:\t0000000000002000"}, doctor.check_net_admin, "warn", "not held"),
        ({"meminfo": "HugePages_Total: 8\nHugePages_Free: 5\nHugepagesize: 2048 kB"}, doctor.check_huge_pages, "ok", "5 of 8 free, 2048"),
        ({"enabled": "always madvise [never]"}, doctor.check_huge_pages, "warn", "never"),
    ],
)
def test_judgement(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], check: object, status: str, part: str) -> None:
    monkeypatch.setattr(doctor, "_text", lambda path: files.get(Path(path).name, ""))
    result = check()  # type: ignore[operator]
    assert result.status == status
    assert part in result.found


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists(cpus: set[int]) -> None:
    assert doctor.cpu_list(",".join(map(str, sorted(cpus)))) == sorted(cpus)


def test_cpu_ranges() -> None:
    assert doctor.cpu_list("0-2,7\n") == [0, 1, 2, 7]
    assert doctor.cpu_list("(null)") == []
