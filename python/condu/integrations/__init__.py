"""ConDU in training loops that others drive: one module for each library, imported by name.

accelerate needs none: ``ConDU`` takes prepared and bare models alike, on every process.
"""
