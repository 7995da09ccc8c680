"""What users and client programs rely on, as plain files: a change of it is seen in review, and never comes by itself.

Each group is a folder of files and the function that takes them. ``make snapshots`` writes them; the tests compare.
"""
