"""Compiling for hardware that is not here, and what follows from the compiled program.

``topology`` names pods and shapes, ``hlo`` reads compiled programs, ``traffic`` counts what they move, ``roofline``
turns counts into seconds, ``plan`` compiles and measures one mesh, ``search`` tries several, ``report`` prints.
"""
