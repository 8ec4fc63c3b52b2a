# Finds the command line of sparsecc and asks for its version.
#
# SPARSECC_EXECUTABLE   the program; set it to use another than the first one on PATH
# sparsecc_VERSION      its version
if(NOT SPARSECC_EXECUTABLE)
  # Installed in an environment of Python, this file lies in lib/pythonX.Y/site-packages/sparsecc/runtime/cmake of it.
  find_program(SPARSECC_EXECUTABLE sparsecc HINTS "${CMAKE_CURRENT_LIST_DIR}/../../../../../../bin"
               DOC "Command line of sparsecc")
endif()
unset(sparsecc_VERSION)
if(SPARSECC_EXECUTABLE)
  execute_process(COMMAND "${SPARSECC_EXECUTABLE}" --version OUTPUT_VARIABLE _sparsecc_told RESULT_VARIABLE _sparsecc_failed
                  ERROR_VARIABLE _sparsecc_error)
  if(_sparsecc_failed EQUAL 0 AND _sparsecc_told MATCHES "version ([0-9.]+)")
    set(sparsecc_VERSION "${CMAKE_MATCH_1}")
  endif()
endif()
