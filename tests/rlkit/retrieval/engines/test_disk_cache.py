"""The cache of strings on disk: any string is a key and a value, and a locked file stops nothing."""

import sqlite3
from contextlib import closing

from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.retrieval.engines import disk_cache
from rlkit.retrieval.engines.disk_cache import DiskCache

STRINGS = st.text(st.characters(exclude_categories=[]), max_size=8)  # with lone surrogates


def test_cache_stores_any_string_under_any_key(tmp_path):
    @given(st.dictionaries(STRINGS, STRINGS, max_size=4))
    @settings(max_examples=50, deadline=None)
    def check(values):
        cache = DiskCache(tmp_path)
        known = cache.get(values)
        cache.put(values)
        assert cache.get(values) == values | known
        assert DiskCache(tmp_path).get([*values, "not stored before"]) == values | known

    check()


def test_locked_cache_is_skipped_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(disk_cache, "MAX_WAIT_SECONDS", 0.1)
    cache = DiskCache(tmp_path)
    with closing(sqlite3.connect(cache.path)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        cache.put({"a": "b"})
    assert "continuing without the cache" in caplog.text
    cache.put({"a": "b"})
    assert cache.get(["a"]) == {"a": "b"}
