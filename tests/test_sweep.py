"""What a sweep says at its end of rows that failed, were not tried, or are finished."""

from sslx.sweep import Job, told_failures


def jobs(**results):
    return [Job(name, (), lambda result=result: result, "") for name, result in results.items()]


def test_the_line_at_the_end_tells_failed_untried_and_finished_rows_apart(tmp_path):
    how = f"what each printed is in {tmp_path}/logs, and the same command tries them again"
    cases = [
        (jobs(a="", b="done"), {"a": "x"}, f"1 of 2 rows failed: a; the others are reported; {how}"),
        (jobs(a="", b="", c=""), {"a": "x", "b": "x"}, f"2 of 3 rows failed: a, b; 1 more were not tried; {how}"),
        (
            jobs(a="done", b="", c="", d="", e=""),
            {"b": "x", "c": "x"},
            f"2 of 5 rows failed: b, c; 2 more were not tried; those that are finished are reported; {how}",
        ),
        (jobs(a="", b=""), {"a": "x", "b": "y"}, f"2 of 2 rows failed: a, b; {how}"),
    ]
    for given, failures, expected in cases:
        assert told_failures(given, failures, tmp_path) == expected
