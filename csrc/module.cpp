// The Python module itself is empty: importing it runs the registrations at the foot of each kernel file.
// Limited API, so that one binary serves every Python from 3.10 on.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "CPU kernels of gradrep_kernels", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
