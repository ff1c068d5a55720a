"""Hundreds of full fine-tunes over one base in memory, each request naming its tenant.

    server -> engine -> router -> Delta.apply      START READING AT engine.py
                 \\-> bank -> resident -> DeltaFile

names.py, refusals.py, requests.py, metrics.py and command.py are what the server needs besides; `serve` is an extra, so
nothing here is imported before `bayou serve` runs.
"""
