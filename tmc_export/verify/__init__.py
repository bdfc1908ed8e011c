"""The parity ladder, and the reference path it stands on: simple, unpadded, and independent of `surgery`."""
