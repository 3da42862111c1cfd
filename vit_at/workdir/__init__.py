"""What a run leaves on disk.

files        config.json, locks, and files that are written whole or not at all
checkpoint   the training state and the best weights, by orbax
results      results.json and per_example.npz
"""
