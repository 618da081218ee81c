"""Progress is read from what programs print, in any of the usual forms."""

from __future__ import annotations

import os
import re

import pytest

from jobstatus_grpc.cli.run.progress import LONGEST_LINE, LastLine, PercentReader, Phases, Progress


def read(*chunks: bytes) -> list[Progress | None]:
    reader = PercentReader()
    return [reader.feed(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    ("line", "percent", "text"),
    [
        (b"42%\n", 42, ""),
        (b"12.5 % done\n", 12.5, "done"),
        (b"  1,234,567  45%    1.23MB/s    0:00:12\r", 45, "1,234,567 1.23MB/s 0:00:12"),
        (b"######################                    45.3%\r", 45.3, ""),
        ("scan:  45%|████▌     | 45/100 [00:04<00:05]".encode(), 45, "scan: | 45/100 [00:04<00:05"),
        (b"x.tar.gz   45%[====>     ]  1.2M  eta 3s\r", 45, "x.tar.gz 1.2M eta 3s"),
        (b"[ 45%] Building CXX object a.o\n", 45, "Building CXX object a.o"),
        (b"\x1b[32mfetching (7%)\x1b[0m\x1b[K\n", 7, "fetching"),
        ("Lädt 12,5 % von 20 GB\n".encode(), 12.5, "Lädt von 20 GB"),
        ("Téléchargement 42\N{NO-BREAK SPACE}%\n".encode(), 42, "Téléchargement"),
        ("42\N{NARROW NO-BREAK SPACE}%\n".encode(), 42, ""),
        (b"GET http://x/a%20b 45%\n", 45, "GET http://x/a%20b"),
    ],
)
def test_a_percentage_is_found_in_the_output_of_common_programs(line, percent, text):
    assert read(line) == [Progress(percent, text)]


def test_the_newest_percentage_counts():
    assert read(b"a 10%\r a 20%\r a 30%\rrest") == [Progress(30, "a")]


def test_a_percentage_may_come_in_pieces():
    assert read(b"1", b"00", b"%") == [None, None, Progress(100, "")]


@pytest.mark.parametrize(
    "line",
    [
        *(b"101%\n", b"-5%\n", b"100 percent\n", b"% done\n", b"1234%\n", b"v1.2.3%4\n"),
        *(b"GET /a1%2Fb\n", b"GET http://x/a%20b\n", b"12%20\n", b"http://x/?q=50%\n", b"v100%\n", b"utf8%\n"),
        b"/dev/sda1       50G   49G  1.0G  98% /\n",
        b"/dev/sda1      3276800 12345 3264455    1% /home\n",
        b"/dev/disk3s1  460Gi  10Gi  300Gi     4%  404k  3.2G    0%   /\n",
        b"TOTAL      120      3    98%\n",
        *(b"disk is 95% full\n", b"CPU: 45%\n", b"3 received, 0% packet loss\n", b"a build that is 20% faster\n"),
    ],
)
def test_what_is_no_percentage_is_left_alone(line):
    assert read(line) == [None]


@pytest.mark.parametrize(
    ("pattern", "lines", "percent", "text"),
    [
        (r"(\d+) of (\d+) files", b"copied 1 of 4 files\n", 25, "copied"),
        (r"step=([\d.]+)", b"step=12.5 loss=3%\r", 12.5, "loss=3%"),
        (r"(\d+)/(\d+)", b"1/0\n 5/4\n 3/4\n 1/10", 75, ""),
    ],
)
def test_what_is_progress_may_be_said_by_a_pattern(pattern, lines, percent, text):
    assert PercentReader(re.compile(pattern)).feed(lines) == Progress(percent, text)


@pytest.mark.parametrize(
    ("percents", "phases"),
    [
        ([50, 100, 3, 4, 99, 49], [1, 1, 2, 2, 2, 3]),
        ([80, 39, 38, 60], [1, 1, 2, 2]),
        ([80, 41, 40, 80], [1, 1, 1, 1]),
        ([90, 5, 91, 6, 92, 7], [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_fall_of_more_than_half_begins_a_phase_unless_bars_take_turns(percents, phases):
    known = Phases()
    assert [known.begins(percent) or known.number for percent in percents] == [
        True if number != before else number for number, before in zip(phases, [1, *phases], strict=False)
    ]


@pytest.mark.parametrize("data", [b"\xff\xfe 7%\n", b"\x00 7%\n", b"\x01 7%\n"])
def test_binary_data_says_nothing(data):
    assert read(data) == [None]


def test_an_endless_line_is_not_kept():
    reader = PercentReader()
    for _ in range(100):
        reader.feed(b"x" * 65536)
    assert len(reader._line) == LONGEST_LINE
    assert reader.feed(b" 7%") is not None


def test_the_last_line_is_the_last_that_is_not_blank():
    last = LastLine()
    last.feed(b"warming up\r 10%\r 20%\ncannot op")
    last.feed(b"en file\n\n  \n")
    assert last.read() == "cannot open file"


def test_the_last_line_needs_no_newline():
    last = LastLine()
    last.feed(b"first\n\x1b[31moops\x1b[0m: \xff")
    assert last.read() == "oops: \N{REPLACEMENT CHARACTER}"


def test_the_last_line_of_nothing_is_empty():
    last = LastLine()
    last.feed(os.linesep.encode())
    assert last.read() == ""
