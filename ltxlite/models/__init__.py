"""The networks of LTX-2.3, one file each; none knows how its weights are stored or moved."""
