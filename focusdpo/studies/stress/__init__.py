"""`focusdpo stress`: does S put each reference's matches on its own subject, where subjects look alike and where they do not?

subjects, scenes: who is composed with whom, as a dataset. features, measures: S of every block, and what is measured of it.
scenes are measured one by one (work), averaged with intervals (summary), and drawn (pictures).
"""
