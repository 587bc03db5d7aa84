"""Contains what an unmodified SGLang needs to serve on a CPU. This folder goes on PYTHONPATH of its process: Python
imports `sitecustomize` from it at start, and SGLang `sgl_kernel`. Nothing in the package imports either."""
