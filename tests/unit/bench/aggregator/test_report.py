from __future__ import annotations

from bench.aggregator import report
from bench.records import Record


def test_sums_are_compared_with_the_copy_of_their_own_repeat():
    records: list[Record] = []
    for repeat, copied in enumerate((10e9, 5e9, 20e9)):
        alike = {"threads": 1, "repeat": repeat, "seconds": 1.0}
        records.append({"what": "copy", "bytes": copied, **alike})
        records.append({"what": "fold", "terms": 4, "bytes": copied / 4, **alike})
    table = report.sums(records)
    assert "| memory copy |  | 1 | 10.0 |  |" in table
    assert "| sum of files | 4 | 1 | 2.5 | 25 % |" in table


def upload(round_number: int, product_s: float) -> Record:
    return {
        "at_once": 1,
        "bytes": 50_000_000,
        "round": round_number,
        "product_s": product_s,
        "bare_s": 0.3,
        "stream_s": 0.2,
        "product_cpu_s": 0.1,
        "bare_cpu_s": 0.05,
    }


def test_ingest_leaves_the_first_round_out():
    found = [upload(1, 9.0), upload(2, 0.4), upload(3, 0.5), upload(4, 0.4)]
    table = report.ingest({"one": found, "four": found, "small": found})
    assert "| 1 x 50 MB | 400 ms | 300 ms | 200 ms | 75 % | 50 % | 2.0 / 1.0 |" in table


def test_memory_is_shown_by_cohort():
    cohort = {"places": 16, "agents": 4, "rounds": 2}
    record = {**cohort, "bytes": 172e6, "idle_bytes": 135e6, "sampled_bytes": 180e6, "most_bytes": 181e6}
    assert "| 16 | 4 | 2 | 172 MB | 135 MB | 180 MB | 181 MB |" in report.memory([record])


def test_a_fleet_s_agents_are_shown_with_what_one_of_them_costs():
    record = {"places": 64, "agents": 100, "seconds": 2.54, "cpu_s": 2.3, "most_bytes": 170e6}
    assert "| 64 | 100 | 2.5 s | 23 ms | 170 MB |" in report.fleet([record])


def test_distance_is_shown_by_round_trip_and_window():
    near = {"round_trip_s": 0.02, "window_bytes": 512 << 10, "bytes": 40_000_000, "up_s": 1.0, "down_s": 0.2}
    table = report.distance([near, {**near, "up_s": 3.0}, {**near, "window_bytes": 4 << 20, "up_s": 0.5}])
    assert "| 20 ms | 0.5 MiB | 20 | 200 |" in table
    assert "| 20 ms | 4 MiB | 80 | 200 |" in table
