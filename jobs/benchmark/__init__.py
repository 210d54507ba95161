"""The benchmark: our job and its peers on the same files, weights and cores, one at a time.

    archives.py     which recordings, with which reference texts
    weights.py      the same weights in every format a contender reads (ggml.py: whisper.cpp's)
    contenders.py   who runs, in which layouts, with which settings
    peers.py, ours.py, ray_example.py    how each of them is called
    worker.py       one process of a contender; processes.py starts, asks and watches it
    measure.py      the order of rounds; results.py the arithmetic of what came out
    page.py         report.html

What is measured, and how to doubt it, is told in docs/benchmark.md.
"""
