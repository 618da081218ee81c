"""Progress is read from what programs print, in any of the usual forms."""

from __future__ import annotations

import os

import pytest

from jobstatus_grpc.cli.run.progress import LONGEST_LINE, LastLine, PercentReader, Progress


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
    ],
)
def test_a_percentage_is_found_in_the_output_of_common_programs(line, percent, text):
    assert read(line) == [Progress(percent, text)]


def test_the_newest_percentage_counts():
    assert read(b"a 10%\r a 20%\r a 30%\rrest") == [Progress(30, "a")]


def test_a_percentage_may_come_in_pieces():
    assert read(b"1", b"00", b"%") == [None, None, Progress(100, "")]


@pytest.mark.parametrize("line", [b"101%\n", b"-5%\n", b"100 percent\n", b"% done\n", b"1234%\n", b"v1.2.3%4\n"])
def test_what_is_no_percentage_is_left_alone(line):
    assert read(line) == [None]


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
