"""Goes on `sys.path`, so that `deep_ep` below is found; not meant to be imported itself."""
