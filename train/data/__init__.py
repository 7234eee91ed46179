"""Data: readers of M3D and of users' own studies, preparation, integrity check, cache, data set and collators."""
