"""The published format, known to both halves: file names, states, fields, geometry.

Standard library alone; knows neither who writes the files nor who reads them.
"""
