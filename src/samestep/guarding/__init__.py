"""Finds workers that are in trouble, and says what is known of it. It decides nothing about the run.

pulse       signs of life, in memory that workers share with the supervisor
patience    which worker is hung, decided from these
stack       the Python stack of a worker that answers nothing else
fence       finds a worker that makes no progress, and writes down what it was doing
crash       what is known of a worker that died in native code
"""
