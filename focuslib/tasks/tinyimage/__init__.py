"""The embedded image benchmark: the attribute questions of tinyvideo, asked about one frame of each clip."""
