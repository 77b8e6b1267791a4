"""Ids of answers and requests."""

import re
from concurrent.futures import ThreadPoolExecutor

from tokendance.server.ids import new_id


def test_no_id_comes_twice() -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda _: new_id(), range(2000)))
    assert len(set(ids)) == 2000
    assert all(re.fullmatch("[0-9a-f]{24}", one) for one in ids)
