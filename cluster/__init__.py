"""Processes: Ray actors, controller, sockets, router, gateway, command line."""
