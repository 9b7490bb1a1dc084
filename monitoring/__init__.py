"""What a run and its machine do, read from the files of its folder."""
