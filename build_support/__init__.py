"""How the compiled parts are built: settings, tools, commands. Used by setup.py and by pip; not installed with the package."""
