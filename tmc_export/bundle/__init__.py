"""The bundle: a folder with a manifest, written atomically and read with its hashes checked."""
