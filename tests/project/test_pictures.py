"""The pictures in docs/ are those of the recordings and of the import contract."""

from __future__ import annotations

import pytest

from tests.support import architecture
from tests.support.recordings import FOLDER, Cast, draw

LAST_WORDS = {"run": "in_progress → succeeded", "watch": "succeeded", "tree": "nightly.thumbnails"}
MAX_BYTES = 60_000


@pytest.mark.parametrize("name", LAST_WORDS)
def test_a_recording_is_drawn_to_its_end_in_a_small_file(name):
    cast, picture = FOLDER / f"{name}.cast", FOLDER / f"{name}.svg"
    assert picture.read_text(encoding="utf-8") == draw(Cast.read(cast.read_text(encoding="utf-8"))), "make recordings"
    assert max(cast.stat().st_size, picture.stat().st_size) < MAX_BYTES


@pytest.mark.parametrize("name", LAST_WORDS)
def test_a_recording_is_as_asciinema_reads_it(name):
    text = (FOLDER / f"{name}.cast").read_text(encoding="utf-8")
    cast = Cast.read(text)
    assert cast.write() == text
    times = [at for at, _ in cast.events]
    assert times == sorted(times)


def test_the_picture_of_the_architecture_is_that_of_the_import_contract():
    assert architecture.PICTURE.read_text(encoding="utf-8") == architecture.draw(), "make architecture"


def test_the_picture_of_the_architecture_says_what_each_module_is_for():
    modules = [module for layer in architecture.layers() for module in layer]
    assert [module for module in modules if not architecture.purpose(module)] == []
    assert architecture.modules_with_grpc() < set(modules)
