"""N-gram language models over token ids: counted, smoothed, pruned, written, looked up.

`counts` → `smoothing` → `pruning` → `arpa` make a `backoff.BackOff`, numpy tables on
the host. `arrays` turns one into arrays that score on the device.
"""
