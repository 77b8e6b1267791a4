"""The server under load, as long as one likes: `make soak`.

    python -m soak            this process: the server, and a look at its memory, pages and threads
        python -m soak.load   a child: clients of many kinds, well-behaved and not, all at once

`run.py` starts both and judges; `load.py` is the clients; `bodies.py` is what they ask, `fuzz.py`
what is wrong with some of it; `loiter.py` is clients that let the server wait; `client.py` is HTTP
with the means to leave at any moment.
Everything is drawn from seeds. Exit code 1 says that something was not as it has to be.
"""
