"""Between memory and disk: what a session leaves is written, and is read when it goes on.

Memory is written through. Whatever of a session's KV is not on disk yet goes there, prompts in the
background while the round decodes (`background.py`) and the rest at its end (`saver.py`), so
eviction from memory only forgets. A round adds files of what several agents read (its runs), and
files of each agent's own tokens; what earlier rounds wrote is referred to again:

    agent's tokens   [ own, round 1 ][ run, round 1 ][ own ][ run, round 2 ][ own, round 2 ]
    extents           file 7, 0-310   file 3, 0-980   7, 310-   file 9, ...   file 12, ...

Rows of a file lie in the order of their slots. When they are read again (`loader.py`) they take
slots in the same order, so attention finds ranges of slots as long as before. Which slots hold
which rows is known in `slot_files.py`, and when reading is quicker than computing in `levels.py`.
"""
