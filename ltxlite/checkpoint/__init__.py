"""From files to models: what a file is, its configuration, and strict assembly.

Nothing in here knows a particular network; the model files bring their names as data.
"""
