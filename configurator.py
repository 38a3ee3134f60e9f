"""nanoGPT's configurator.py, for scripts of your own that take their settings this way:

    batch_size = 12
    exec(open("configurator.py").read())
    # python script.py preset.py --batch_size=32

The script's global variables are its settings. Arguments apply from left to right: the path of a preset (a Python file
that runs among those globals), or --name=value. The project's own commands do not use this file; they read
src/llm_from_scratch/presets.py.
"""

import sys


def _configure(settings, arguments):
    """Overrides plain values in settings, a script's globals(). A mistake ends the script with one line and code 2."""
    import builtins
    from ast import literal_eval
    from difflib import get_close_matches

    plain = (bool, int, float, str, tuple, list, dict, type(None))

    def stop(message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            if argument.startswith("-"):
                stop(f"argument {argument!r} has no value: settings are written --name=value")
            try:
                with open(argument, encoding="utf-8") as file:
                    code = builtins.compile(file.read(), argument, "exec")  # compile is a setting there
            except OSError as e:
                stop(f"cannot read preset {argument!r}: {e.strerror}; expected the path of a Python file")
            except (SyntaxError, ValueError) as e:
                stop(f"preset {argument!r} is not a Python file: {e}")
            print(f"Overriding config with {argument}")
            try:
                exec(code, settings)
            except Exception as e:
                line = e.__traceback__.tb_next.tb_lineno if e.__traceback__.tb_next else 0
                stop(f"preset {argument!r}, line {line}: {type(e).__name__}: {e}")
            continue
        if not name.startswith("--"):
            stop(f"argument {argument!r} is neither a preset's path nor --name=value")
        name = name[2:]
        known = [key for key, value in settings.items() if not key.startswith("_") and isinstance(value, plain)]
        if name not in known:
            near = get_close_matches(name, known, n=1)
            stop(f"Unknown config key: {name}" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            value = literal_eval(text)
        except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
            value = text  # an unquoted string
        old = settings[name]
        if isinstance(old, str) and not isinstance(value, str):
            value = text  # --run_name=2024 names a run
        if isinstance(old, float) and type(value) is int:
            value = float(value)
        if old is not None and type(value) is not type(old):
            stop(f"--{name}={text} is of type {type(value).__name__}: expected {type(old).__name__}, like {old!r}")
        print(f"Overriding: {name} = {value!r}")
        settings[name] = value


_configure(globals(), sys.argv[1:])
del _configure
