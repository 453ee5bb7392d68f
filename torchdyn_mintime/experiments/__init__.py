"""Data, models, methods and tables: the paper's experiments, with the controls beside them.

One direction: data and models -> tasks -> methods -> training -> measure -> store -> tables, figures and the demo.
"""
