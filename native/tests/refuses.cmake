# cmake -DPROGRAM=FILE -DWORDS=A;B -DTELLS=REGEX -P refuses.cmake: the program must end with 2 and tell the regex.
execute_process(COMMAND ${PROGRAM} ${WORDS} RESULT_VARIABLE status OUTPUT_VARIABLE told ERROR_VARIABLE told)
if(NOT status EQUAL 2 OR NOT told MATCHES "${TELLS}")
  message(FATAL_ERROR "${PROGRAM} ${WORDS} ended with ${status} and told: ${told}")
endif()
