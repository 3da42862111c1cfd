"""What a run leaves on disk.

files        config.json, locks, atomic writing
checkpoint   the training state and the best weights, by orbax
results      results.json and per_example.npz
"""
