"""How rows move. `base.py` is the seam, `registry.py` finds and chooses; each folder beside them is one backend."""
